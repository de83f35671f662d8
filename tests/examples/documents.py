"""The documents: what programs and shell lines they show, and what is made from data.

``python -m tests.examples.documents`` brings the documents up to date: programs that stand under a
comment with the name of their file, and tables that stand between two comments.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aiotaskq.config import Config, Setting
from aiotaskq.contract.broker import Traits
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.drivers.postgres import PostgresBroker
from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.redis import RedisBroker
from aiotaskq.drivers.redis.cluster import ClusterBroker
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.tasks.option_table import OPTIONS, Scope
from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_PROGRAM = re.compile(r"<!-- (examples/\S+) -->\n```python\n(.*?)```\n", re.DOTALL)
_TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a document."""

    section: str
    kind: str
    text: str


def blocks(document: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a document, with the heading that each stands under."""
    text = document.read_text(encoding="utf-8")
    # A comment of a shell would look like a heading.
    bare = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    headings = [(text_line(bare, found.start()), found[1]) for found in _HEADING.finditer(bare)]
    for found in _FENCE.finditer(text):
        line = text_line(text, found.start())
        section = [name for at, name in headings if at < line][-1]
        yield Block(section, found[1], found[2])


def text_line(text: str, at: int) -> int:
    """Return the number of the line that a position is in."""
    return text.count("\n", 0, at)


def updated(text: str) -> str:
    """Return the text of a document with the programs and tables as they are now."""

    def program(found: re.Match[str]) -> str:
        source = (ROOT / found[1]).read_text(encoding="utf-8")
        return f"<!-- {found[1]} -->\n```python\n{source}```\n"

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]()}\n<!-- end -->"

    return _TABLE.sub(table, _PROGRAM.sub(program, text))


def settings_table() -> str:
    """Return every setting as a row."""
    lines = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for name, setting in Config.settings().items():
        mark = "" if setting.ours else " ᶜ"
        cells = (f"`{name}`{mark}", _default(setting), setting.wants, setting.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(setting: Setting[Any, Any]) -> str:
    value = setting.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping | tuple | frozenset | set | list) and not value:
        return "empty"
    if isinstance(value, float):
        return f"`{value:g}`" if value != int(value) else f"`{int(value)}`"
    if isinstance(value, frozenset | set | tuple):
        return ", ".join(f"`{item}`" for item in sorted(value))
    return f"`{value}`"


_WHY = {
    "worker_lease": "rides out a pause of the collector, the network or a busy machine; where "
    "nobody sees a worker die, its tasks come back after so long",
    "worker_heartbeat": "four beats may be lost before the lease is",
    "worker_grace_period": "less than the 30 s that Docker and Kubernetes wait before they kill",
    "task_cancel_grace": "time for `finally` and for closing connections",
    "max_crashes": "one may be chance, two bad luck; from the second on the task runs alone",
    "unknown_task_ttl": "a rolling deploy is over by then",
    "dead_letter_max": "what somebody can still look through; bounds what the store needs",
    "dead_letter_expires": "longer than holidays",
    "worker_max_stuck_tasks": "each may hold a thread or memory for ever",
    "worker_loop_block_warning": "whoever shares the loop has felt it by then",
    "worker_loop_block_limit": "killing a process takes the other tasks of it along: your choice",
    "broker_publish_timeout": "a restart of the server is over by then, a web request not",
    "result_expires": "as in Celery",
    "max_payload_size": "a queue is for references to large data",
    "task_time_limit": "nothing is taken from a task because it is long",
    "task_default_retry": "only you know whether a task bears running twice",
}


def defaults_table() -> str:
    """Return the settings that the guarantees rest on, each with the reason for its default."""
    settings = Config.settings()
    lines = ["| setting | default | because |", "|---|---|---|"]
    lines += [f"| `{name}` | {_default(settings[name])} | {why} |" for name, why in _WHY.items()]
    return "\n".join(lines) + "\n"


_BROKERS: Mapping[str, Traits] = {
    "memory": MemoryBroker.traits,
    "SQLite": SQLiteBroker.traits,
    "Redis, Sentinel": RedisBroker.traits,
    "Redis Cluster": ClusterBroker.traits,
    "PostgreSQL": PostgresBroker.traits,
    "RabbitMQ": RabbitBroker.traits,
}
_TRAITS = {
    "priorities": "priorities 0 to 9 within a queue",
    "unique": "stores an id of your own once a day",
    "schedules": "keeps schedules, and sends each due run once",
    "durable": "survives a restart of every process",
    "shared": "reached by other processes",
    "leases": "a worker outlives its connection, and others may end its lease",
    "order": "what is handed back goes to the head of its queue, suspects before all",
    "atomic": "a retry or a dead letter replaces its message in one step",
    "idempotent": "sending that is repeated after a lost answer stores nothing twice",
    "clock": "delays and expiry go by the store's one clock",
    "counts_delayed": "counts the delayed messages of each queue, and can purge them",
    "transactional": "stores a task in a transaction of yours; others by way of the outbox",
}


def traits_table() -> str:
    """Return what each broker can do."""
    assert set(_TRAITS) == set(Traits.__struct_fields__)
    lines = [f"| | {' | '.join(_BROKERS)} |", f"|---|{'---|' * len(_BROKERS)}"]
    for trait, meaning in _TRAITS.items():
        has = ("yes" if getattr(traits, trait) else "no" for traits in _BROKERS.values())
        lines.append(f"| `{trait}`: {meaning} | {' | '.join(has)} |")
    return "\n".join(lines) + "\n"


def modules_table() -> str:
    """Return the modules and packages, each with the first sentence of its text."""
    package = ROOT / "aiotaskq"
    lines = ["| | |", "|---|---|"]
    for path in sorted([*package.glob("*.py"), *package.glob("*/__init__.py")]):
        name = path.name if path.parent == package else f"{path.parent.name}/"
        if name != "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            lines.append(f"| `{name}` | {text.partition(chr(10) * 2)[0].replace('``', '`')} |")
    return "\n".join(line.replace("\n", " ") for line in lines) + "\n"


def layers_list() -> str:
    """Return the layers as they are enforced, the highest first."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    lines = [re.findall(r"\w+", layer) for layer in layers]
    there = {path.stem for path in (ROOT / "aiotaskq").iterdir()}
    kept = [" │ ".join(name for name in line if name in there) for line in lines]
    return "```text\n" + "\n".join(filter(None, kept)) + "\n```\n"


def options_table() -> str:
    """Return every option of tasks and calls as a row."""
    lines = [
        "| option | task | call | values | setting | Celery | meaning |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, option in OPTIONS.items():
        given = ("yes" if scope in option.scopes else "" for scope in Scope)
        setting = f"`{option.setting}`" if option.setting else ""
        celery = f"`{option.celery}`" if option.celery else ""
        if option.part_of:
            celery = f"part of `{option.part_of}`"
        cells = (f"`{name}`", *given, option.kind.wants, setting, celery, option.meaning)
        row = " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in cells)
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "settings": settings_table,
    "options": options_table,
    "defaults": defaults_table,
    "traits": traits_table,
    "modules": modules_table,
    "layers": layers_list,
    **report.TABLES,
}


if __name__ == "__main__":
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        document.write_text(updated(before), encoding="utf-8")
