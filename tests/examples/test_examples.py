"""Every example, run as its docstring says."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.examples.running import (
    EXAMPLES,
    ID,
    Program,
    copied,
    environment,
    fetch,
    printed,
    running,
    working,
)
from tests.servers import PostgresServer, RedisServer, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ADD = """\
from tasks import add
r = add.delay(2, 8)
r
r.get(timeout=280), r.status, r.ready(), r.result
"""


def redis_environment(server: RedisServer) -> dict[str, str]:
    return environment(REDIS_URL=server.url(0).removesuffix("/0"))


def in_shell(lines: str, folder: Path, env: dict[str, str]) -> list[str]:
    """Type lines into a Python shell and return its output."""
    return printed("python -q -i", folder, env, stdin=lines).splitlines()


def check_add(worker: Program, folder: Path, env: dict[str, str]) -> str:
    """Send `add` from a shell, check the shell and the worker, and return the id."""
    shown, got = in_shell(ADD, folder, env)
    found = re.fullmatch(f"<AsyncResult: ({ID})>", shown)
    assert found is not None
    assert got == "(10, 'SUCCESS', True, 10)"
    worker.wait_for(rf"Task tasks\.add\[{found[1]}\] received")
    worker.wait_for(rf"Task tasks\.add\[{found[1]}\] succeeded in \d+\.\d+s: 10")
    return found[1]


# --- the default store: SQLite -------------------------------------------------------------------


def test_the_demo_prints_its_results_and_ends_with_0(tmp_path: Path) -> None:
    out = printed(["python", str(EXAMPLES / "demo.py")], tmp_path, environment())
    assert re.search(r"add\.kiq\(2, 8\) +10\n", out)
    assert re.search(r"100 calls\]\) +a sum of 9,900 in ", out)
    assert "is caught as ZeroDivisionError: float division by zero" in out
    assert "'FROM PLAIN CODE'" in out
    assert re.search(rf"Task demo\.add\[{ID}\] succeeded in \d\.\d+s: 10\n", out)
    assert out.endswith("The worker was told to stop, and ended with status 0.\n")
    assert list(tmp_path.iterdir()) == [], "it leaves something in the working folder"


def test_the_embedded_default_is_a_file_that_worker_and_shell_share(tmp_path: Path) -> None:
    folder = copied("tasks.py", tmp_path)
    env = environment()
    with working("tasks:app", folder, env) as worker:
        assert "transport:   sqlite:///aiotaskq.db\n" in worker.text
        check_add(worker, folder, env)
        asked = "aiotaskq call tasks:app tasks.count_words 'three short words' --wait"
        assert printed(asked, folder, env) == "3\n"
    assert (folder / "aiotaskq.db").exists()


def test_a_script_sends_and_waits(tmp_path: Path) -> None:
    folder = copied("script.py", tmp_path)
    with working("script:app", folder, environment()):
        out = printed("python script.py", folder, environment())
    assert out == "'one' has 1\n'two words' has 2\n'now three words' has 3\n"


@pytest.mark.parametrize("store", ["embedded", "redis"])
def test_ten_thousand_sleepers_share_one_worker_process(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = copied("sleepers.py", tmp_path)
    env = environment()
    if store == "redis":
        env["AIOTASKQ_BROKER_URL"] = request.getfixturevalue("redis_url")
    options = "-c 10000 -l warning"
    with running(f"aiotaskq worker sleepers:app {options}", folder, env) as worker:
        worker.wait_for(r"\. sleepers\.nap\n")
        out = printed("python sleepers.py", folder, env)
    found = re.fullmatch(r"sent 10,000 tasks in .* s\nall had slept after ([\d.]+) s\n", out)
    assert found is not None, out
    # One at a time they would take almost three hours, a hundred at a time 100 seconds.
    assert float(found[1]) < 20.0


def test_a_middleware_carries_a_header_and_an_observer_counts(tmp_path: Path) -> None:
    folder = copied("middleware.py", tmp_path)
    env = environment(LOGNAME="ada")
    with working("middleware:app", folder, env) as worker:
        call = "aiotaskq call middleware:app middleware.divide"
        assert printed(f"{call} 1 4 --wait", folder, env) == "0.25\n"
        printed(f"{call} 1 0", folder, env)
        worker.wait_for(r"middleware\.divide for ada took 0\.\d+ s")
        worker.wait_for(r"middleware\.divide has failed 1 times")


# --- Redis and PostgreSQL -----------------------------------------------------------------------


def test_redis_holds_the_result_as_json_for_a_day(
    tmp_path: Path, redis_url: str, redis_server: RedisServer
) -> None:
    folder = copied("redis", tmp_path)
    env = redis_environment(redis_server)
    with working("tasks:app", folder, env) as worker:
        assert f"transport:   {redis_server.url(0)}\n" in worker.text
        assert f"results:     {redis_server.url(1)}\n" in worker.text
        assert ". tasks.add\n" in worker.text
        task_id = check_add(worker, folder, env)
        asked = f"redis-cli -p {redis_server.port} -n 1"
        kept = json.loads(printed(f"{asked} get aiotaskq:result:{task_id}", folder, env))
        assert (
            86_000 < int(printed(f"{asked} ttl aiotaskq:result:{task_id}", folder, env)) <= 86_400
        )
    assert (kept["task_id"], kept["status"], kept["result"]) == (task_id, "SUCCESS", 10)
    assert {"traceback", "children", "date_done"} <= kept.keys()


def test_postgres_results_make_their_table_and_can_be_read(
    tmp_path: Path,
    redis_url: str,
    redis_server: RedisServer,
    postgres_url: str,
    postgres_server: PostgresServer,
) -> None:
    folder = copied("postgres_results", tmp_path)
    env = redis_environment(redis_server)
    env["POSTGRES_URL"] = postgres_url.replace("postgresql://", "db+postgresql+psycopg2://")
    database = postgres_url.rpartition("/")[2]
    with working("tasks:app", folder, env) as worker:
        task_id = check_add(worker, folder, env)
    [row] = postgres_server.sql("SELECT * FROM aiotaskq_results", database=database)
    assert row.startswith(f"{task_id}|SUCCESS|10|")
    assert "|[2, 8]|{}|" in row
    [types] = postgres_server.sql(
        "SELECT pg_typeof(result), pg_typeof(args), pg_typeof(kwargs) FROM aiotaskq_results",
        database=database,
    )
    assert types == "jsonb|jsonb|jsonb"


def test_a_lifespan_gives_the_tasks_a_pool(tmp_path: Path, postgres_url: str) -> None:
    folder = copied("lifespan_pool.py", tmp_path)
    env = environment(DATABASE_URL=postgres_url)
    with working("lifespan_pool:app", folder, env):
        call = "aiotaskq call lifespan_pool:app lifespan_pool.server_version --wait"
        assert re.match(r'"\d+', printed(call, folder, env))


# --- a project with the layout of Celery ---------------------------------------------------------

CELERY_WORKER = "aiotaskq -A celery_app worker --loglevel=info"


def check_celery_client(worker: Program, sent: str) -> None:
    first, second = sent.split()
    worker.wait_for(rf"Task celery_app\.task1\.add\[{first}\] succeeded in \d+\.\d+s: 10")
    worker.wait_for(rf"Task celery_app\.task2\.multiply\[{second}\] succeeded in \d+\.\d+s: 21")


def test_a_celery_project_runs_as_worker_and_client(
    tmp_path: Path, redis_url: str, redis_server: RedisServer
) -> None:
    hosts = [tmp_path / "worker", tmp_path / "client"]
    folders = [copied("celery_project", host) for host in hosts]
    env = redis_environment(redis_server)
    with running(CELERY_WORKER, folders[0], env) as worker:
        worker.wait_for(r" ready\n")
        for name in ("celery_app.task1.add", "celery_app.task2.multiply"):
            assert f"  . {name}\n" in worker.text
        check_celery_client(worker, printed("python client.py", folders[1], env))


class Hosts:
    """Three network namespaces: Redis, a worker, a client; worker and client reach only Redis."""

    def __init__(self) -> None:
        own = f"aqt{os.getpid()}"
        self.redis, self.worker, self.client = (f"{own}{part}" for part in "rwc")
        self.addresses: list[str] = []

    def open(self) -> None:
        for name in (self.redis, self.worker, self.client):
            self._ip("netns", "add", name)
            self._ip("-n", name, "link", "set", "lo", "up")
        for number, name in enumerate((self.worker, self.client), 1):
            ours, theirs = f"10.213.{number}.1", f"10.213.{number}.2"
            self._ip(
                "link", "add", f"red{number}", "netns", self.redis,
                "type", "veth", "peer", "name", "eth0", "netns", name,
            )  # fmt: skip
            for host, device, address in (
                (self.redis, f"red{number}", ours),
                (name, "eth0", theirs),
            ):
                self._ip("-n", host, "address", "add", f"{address}/24", "dev", device)
                self._ip("-n", host, "link", "set", device, "up")
            self.addresses.append(ours)

    def close(self) -> None:
        for name in (self.redis, self.worker, self.client):
            with suppress(FileNotFoundError):  # no `ip` at all
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def on(self, name: str, command: str) -> str:
        return f"ip netns exec {name} {command}"

    def _ip(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PermissionError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    try:
        hosts.open()
        yield hosts
    except (PermissionError, FileNotFoundError) as error:
        pytest.skip(f"no network namespaces can be made here: {error}")
    finally:
        hosts.close()


def test_worker_and_client_run_on_two_hosts(tmp_path: Path, hosts: Hosts) -> None:
    parts = [copied("celery_project", tmp_path / host) for host in ("worker", "client")]
    worker_env, client_env = (
        environment(REDIS_URL=f"redis://{address}:6379") for address in hosts.addresses
    )
    options = f"--bind {' '.join(hosts.addresses)} --protected-mode no --save '' --port 6379"
    server = hosts.on(hosts.redis, f"redis-server {options}")
    with (
        running(server, tmp_path, environment()) as redis,
        running(hosts.on(hosts.worker, CELERY_WORKER), parts[0], worker_env) as worker,
    ):
        redis.wait_for("Ready to accept connections")
        worker.wait_for(r" ready\n")
        sent = printed(hosts.on(hosts.client, "python client.py"), parts[1], client_env)
        check_celery_client(worker, sent)


# --- web ----------------------------------------------------------------------------------------


@contextmanager
def serving(command: str, folder: Path, env: dict[str, str]) -> Iterator[str]:
    """Run a web server during the block; yields its address."""
    port = free_port()
    env = {**env, "UVICORN_PORT": str(port), "FLASK_RUN_PORT": str(port)}
    # Werkzeug does not handle SIGTERM, so it does not end with status 0.
    program = Program(command, folder, env)
    try:
        program.wait_for(rf"[Rr]unning on http://127\.0\.0\.1:{port}")
        yield f"http://127.0.0.1:{port}"
    except BaseException as error:
        error.add_note(program.text)
        raise
    finally:
        program.stop()


def check_routes(address: str, until: Program | None) -> None:
    sent = fetch(f"{address}/test_send_task/?x=100&y=200")
    task_id = sent["id"]
    assert re.fullmatch(ID, task_id)
    if until is not None:
        until.wait_for(rf"\[{task_id}\] succeeded in .*: 300")
    answer: dict[str, Any] = {}
    while answer.get("status") != "SUCCESS":  # the worker logs it before it stores it
        answer = fetch(f"{address}/test_task_result/{task_id}/")
        assert answer["status"] in ("PENDING", "SUCCESS")
    assert answer == {"status": "SUCCESS", "result": 300}
    nothing = fetch(f"{address}/test_task_result/{'0' * 8}/")
    assert nothing == {"status": "PENDING", "result": None}


@pytest.mark.parametrize("store", ["embedded", "redis"])
@pytest.mark.parametrize(
    ("example", "command"),
    [("web_fastapi", "uvicorn main:api"), ("web_flask", "flask --app main run")],
)
def test_a_web_server_sends_and_a_worker_runs(
    example: str, command: str, store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = copied(example, tmp_path)
    env = environment()
    if store == "redis":
        env["AIOTASKQ_BROKER_URL"] = request.getfixturevalue("redis_url")
    with serving(command, folder, env) as address:
        # The id is returned at once, without a worker.
        early = fetch(f"{address}/test_send_task/?x=1&y=2")["id"]
        assert fetch(f"{address}/test_task_result/{early}/")["status"] == "PENDING"
        with working("main:app", folder, env) as worker:
            worker.wait_for(rf"\[{early}\] succeeded in .*: 3\n")
            check_routes(address, worker)


def test_the_worker_may_live_in_the_web_server(tmp_path: Path) -> None:
    folder = copied("web_fastapi_embedded", tmp_path)
    with serving("uvicorn main:api", folder, environment()) as address:
        check_routes(address, None)
