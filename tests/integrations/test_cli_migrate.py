"""`aiotaskq migrate`, as a user meets it: output and exit status."""

from __future__ import annotations

import pytest

from tests.integrations.programs import Programs, assert_help
from tests.servers import PostgresServer

pytestmark = pytest.mark.timeout(400)

TASKS = """\
from aiotaskq import TaskQueue
app = TaskQueue("tasks")

@app.task
async def add(x: int, y: int) -> int:
    return x + y
"""


@pytest.fixture
def programs(programs: Programs) -> Programs:
    programs.write("tasks.py", TASKS)
    return programs


def test_the_tables_are_made_once(programs: Programs, postgres_url: str) -> None:
    where = {"AIOTASKQ_BROKER_URL": postgres_url}
    expected = [
        f"broker {postgres_url}: 002_broker",
        f"results {postgres_url}: 001_results",
    ]
    for _ in range(2):
        done = programs.run("migrate", "tasks:app", "--dry-run", **where)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [f"{line} is missing" for line in expected]
    done = programs.run("migrate", "tasks:app", **where)
    assert done.stdout.splitlines() == [f"{line} applied" for line in expected]
    done = programs.run("-A", "tasks", "migrate", **where)
    assert done.stdout.splitlines() == [
        f"broker {postgres_url}: up to date",
        f"results {postgres_url}: up to date",
    ]


def test_what_is_printed_as_sql_makes_the_tables(
    programs: Programs, postgres_server: PostgresServer, postgres_url: str
) -> None:
    where = {"AIOTASKQ_BROKER_URL": postgres_url}
    done = programs.run("migrate", "tasks:app", "--sql", **where)
    assert done.returncode == 0
    # Each statement of a script by itself, as psql has it.
    postgres_server.sql(done.stdout, database=postgres_url.rpartition("/")[2])
    done = programs.run("migrate", "tasks:app", **where)
    assert done.stdout.count("up to date") == 2


def test_stores_without_tables_say_so(programs: Programs) -> None:
    done = programs.run("migrate", "tasks:app", AIOTASKQ_BROKER_URL="redis://u:secret@h:1/0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "broker redis://u:***@h:1/0: has no tables to migrate",
        "results redis://u:***@h:1/0: has no tables to migrate",
    ]


def test_a_server_that_is_away_or_refuses_is_one_line(
    programs: Programs, postgres_server: PostgresServer, postgres_url: str
) -> None:
    guarded = postgres_server.guarded_url(postgres_url.rpartition("/")[2])
    for url, reason in (
        ("postgresql://127.0.0.1:1/x", "cannot be reached"),
        (guarded, "permission denied"),
        (postgres_server.url("nowhere"), "createdb"),
    ):
        done = programs.run("migrate", "tasks:app", AIOTASKQ_BROKER_URL=url)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert reason in line
        assert postgres_server.guarded_password not in line


def test_a_worker_runs_with_tasks_results_and_schedules_in_one_database(
    programs: Programs, postgres_url: str
) -> None:
    where = {"AIOTASKQ_BROKER_URL": postgres_url}
    worker = programs.worker("tasks:app", "-B", **where)
    done = programs.run("call", "tasks:app", "tasks.add", "2", "8", "--wait", **where)
    assert (done.returncode, done.stdout.strip()) == (0, "10")
    assert worker.stop() == 0


def test_help_tells_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert_help(["migrate"], ["--dry-run", "--sql", "Make the tables"], capsys)
