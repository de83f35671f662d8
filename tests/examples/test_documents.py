"""The documents match the code, and the shell sessions of the README print the lines it shows."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiotaskq
from aiotaskq.config import Config
from tests.examples.documents import DOCUMENTS, ROOT, TABLES, blocks, updated
from tests.examples.running import environment, printed, run
from tests.examples.sessions import Session, Step, steps
from tests.servers import PostgresServer, RedisServer, free_port

README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
GLOSSARY = ROOT / "docs" / "glossary.md"
SETTING_UP = ("Install", "aiotaskq")  # sections that need the network
SECTIONS = list(
    dict.fromkeys(
        block.section
        for block in blocks(README)
        if block.kind == "console" and block.section not in SETTING_UP
    )
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_programs_and_tables_are_up_to_date(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert text == updated(text), "run: python -m tests.examples.documents"


def test_every_table_is_shown_once() -> None:
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    shown = re.findall(r"<!-- table: (\w+) -->\n\n(?:\||```)", text)
    assert sorted(shown) == sorted(TABLES)
    settings = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert all(f"| `{name}`" in settings for name in Config.settings())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_program_is_from_a_file_of_the_examples(document: Path) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").rglob("*.py")]
    for block in blocks(document):
        if block.kind == "python":
            assert any(block.text in source for source in sources), block.text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_only_the_readme_has_sessions_and_every_block_says_what_it_is(document: Path) -> None:
    allowed = {"python", "console", "text"} if document == README else {"python", "text"}
    assert {block.kind for block in blocks(document)} <= allowed


@pytest.mark.parametrize("document", [*DOCUMENTS, CONTRIBUTING], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if target.startswith("http"):
            continue
        page = document.parent / target if target else document
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings of a document, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, CONTRIBUTING], ids=lambda path: path.name)
def test_every_path_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for path in re.findall(r"`((?:aiotaskq|tests|examples|benchmarks|scripts)/[^`\s]*)`", prose):
        assert list(ROOT.glob(path.removesuffix("/"))), path


def test_contributing_says_where_to_look_for_most_things() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    _, _, table = text.partition("## Where to look\n")
    rows = [line for line in table.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    assert all("`" in row.split("|")[2] for row in rows[1:])


def test_every_class_of_the_glossary_exists() -> None:
    rows = re.findall(r"^\|.*\|(.*)\|$", GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    defined = {
        node.name
        for path in (ROOT / "aiotaskq").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert named
    assert named <= defined


def test_the_readme_can_be_read_in_five_minutes() -> None:
    text = README.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert len(prose.split()) < 1_000
    assert len(text.splitlines()) < 400


def test_the_changelog_begins_with_what_is_unreleased_then_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[?([^\]\s]+)", text, flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:] == [] or headings[1] == aiotaskq.__version__


# --- sessions -----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project, as in a fresh checkout."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "aiotaskq.db*")
    for name in ("aiotaskq", "examples", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("Makefile", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def shim(folder: Path, name: str, text: str) -> None:
    """Make a command with the name of an installed one, for a folder that comes first in PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def session(
    checkout: Path,
    redis_url: str,
    redis_server: RedisServer,
    postgres_url: str,
    postgres_server: PostgresServer,
) -> Iterator[Session]:
    """A terminal in which the addresses in the document lead to the servers of the tests."""
    place = f"{redis_server.host}:{redis_server.port}"
    web, flask = free_port(), free_port()
    commands = checkout / "commands"
    commands.mkdir()
    redis_cli = shutil.which("redis-cli")
    shim(commands, "redis-cli", f'exec {redis_cli} -p {redis_server.port} "$@"')
    # Without a terminal, `python -i` still prints the value of each line.
    shim(commands, "python", f'exec {shlex.quote(sys.executable)} -i "$@"')
    if shutil.which("curl") is None:
        get = "import sys, urllib.request as r; print(r.urlopen(sys.argv[-1]).read().decode())"
        shim(commands, "curl", f'exec {shlex.quote(sys.executable)} -c "{get}" "$@"')
    env = environment(
        REDIS_URL=f"redis://{place}",
        POSTGRES_URL=postgres_url.replace("postgresql://", "db+postgresql+psycopg2://"),
        PGHOST=postgres_server.host,
        PGPORT=str(postgres_server.port),
        PGUSER=postgres_server.user,
        PGDATABASE=postgres_url.rpartition("/")[2],
        UVICORN_PORT=str(web),
        FLASK_RUN_PORT=str(flask),
    )
    env["PATH"] = f"{commands}:{env['PATH']}"
    elsewhere = {
        "localhost:6379": place,
        "127.0.0.1:8000": f"127.0.0.1:{web}",
        "127.0.0.1:5000": f"127.0.0.1:{flask}",
    }
    with Session(checkout, env, elsewhere) as session:
        yield session


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("section", SECTIONS)
def test_the_sessions_of_the_readme_go_as_they_are_shown(section: str, session: Session) -> None:
    shown = [
        block for block in blocks(README) if block.kind == "console" and block.section == section
    ]
    for block in shown:
        for step in steps(block.text):
            session.type(step)
    session.finish()


def commands_of(section: str) -> list[Step]:
    return [
        step
        for block in blocks(README)
        if block.kind == "console" and block.section == section
        for step in steps(block.text)
    ]


def set_up(command: str, checkout: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that installs; skip the test if there is no package index."""
    # Compiling the installed packages would take longer than installing them.
    done = run(command, checkout, environment(PIP_NO_COMPILE="1"), timeout=400)
    said = done.stdout + done.stderr
    if done.returncode != 0 and re.search(
        "No matching distribution|NewConnectionError|Temporary failure in name resolution", said
    ):
        pytest.skip(f"{command} reaches no package index here")
    assert done.returncode == 0, said
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_installed_is_enough_for_the_demo_and_then_for_the_web(checkout: Path) -> None:
    demo, test = (step.command for step in commands_of("aiotaskq"))
    assert (demo, test) == ("make demo", "make test")
    done = set_up(f"{demo} PYTHON={shlex.quote(sys.executable)}", checkout)
    assert "ended with status 0." in done.stdout
    # Running all tests from a test would never end: only the planned commands are checked.
    planned = run(f"{test} --dry-run", checkout, environment())
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.splitlines()[-1].strip().startswith(".venv/bin/python -m pytest")

    made, activated, base, web = (step.command for step in commands_of("Install"))
    assert made == "python3 -m venv venv"
    assert base == "pip install ."
    assert web == "pip install '.[fastapi,flask]' uvicorn"
    # The environment of `make demo` has what `pip install .` installs, so one is enough here.
    activated = activated.replace("venv/", ".venv/")
    set_up(f"{activated} && {web}", checkout)
    shutil.rmtree(checkout / "aiotaskq")  # so that the installed package is imported
    for example in ("web_fastapi", "web_fastapi_embedded", "web_flask"):
        folder = checkout / "examples" / example
        printed([str(checkout / ".venv/bin/python"), "-c", "import main"], folder, environment())
    printed(".venv/bin/uvicorn --version && .venv/bin/flask --version", checkout, environment())
