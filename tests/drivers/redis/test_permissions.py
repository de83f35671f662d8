"""Users of a Redis server: each role suffices for its programs, and for nothing else.

The conformance suites run as a user of the role `all`, in every topology.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from aiotaskq import Retry, Schedule, TaskQueue, bridge
from aiotaskq.cli import main
from aiotaskq.contract.message import Envelope
from aiotaskq.drivers import redis as driver
from aiotaskq.drivers.redis import RedisBroker, scripts
from aiotaskq.drivers.redis.permissions import ROLES, TOPOLOGY_COMMANDS, cluster_role
from aiotaskq.drivers.redis.scripts import RedisScript
from aiotaskq.errors import TaskFailed, TaskRevoked
from tests.servers import RedisServer

PATIENCE = 30.0
FORBIDDEN = [
    "FLUSHALL",
    "FLUSHDB",
    "CONFIG GET requirepass",
    "CONFIG SET maxmemory 1",
    "CLIENT KILL TYPE normal",
    "CLIENT LIST",
    "MIGRATE 127.0.0.1 1 aiotaskq:queues 0 10",
    "KEYS *",
    "SCAN 0",
    "RANDOMKEY",
    "DBSIZE",
    "SHUTDOWN NOSAVE",
    "MONITOR",
    "ACL LIST",
    "REPLICAOF NO ONE",
    "SWAPDB 0 1",
    "MODULE LIST",
    "SCRIPT FLUSH",
    "FUNCTION FLUSH",
    "SAVE",
    "DUMP aiotaskq:queues",
    "RESTORE aiotaskq:x 0 x",
    "RENAME aiotaskq:queues aiotaskq:x",
    "COPY aiotaskq:queues aiotaskq:x",
    "OBJECT ENCODING aiotaskq:queues",
    "SORT aiotaskq:queues",
    "PSUBSCRIBE *",
    "PUBLISH other x",
    "SUBSCRIBE other",
    "GET other",
    "SET other 1",
    "DEL other",
    "EVAL return(redis.call('FLUSHALL')) 0",
    "EVAL return(redis.call('SET','other',1)) 0",
]


@pytest.fixture
def user(redis_server: RedisServer, redis_url: str) -> Iterator[Callable[[str], str]]:
    """Returns the URL of a user with the rules of a role; a command that is refused fails."""
    control = redis.Redis(host=redis_server.host, port=redis_server.port)
    control.acl_log_reset()

    def make(role: str) -> str:
        rules = ROLES[role].rules()
        control.execute_command("ACL", "SETUSER", role, "reset", "on", ">pass", *rules)  # type: ignore[no-untyped-call]  # redis-py's
        return redis_server.url(1, account=f"{role}:pass")

    yield make
    refused = control.acl_log()
    control.acl_deluser(*ROLES)
    control.close()
    assert not refused


@pytest.fixture(autouse=True)
def stop_the_bridge() -> Iterator[None]:
    yield
    bridge.stop()


def application(url: str, **settings: Any) -> TaskQueue:
    app = TaskQueue("tasks", broker=url, **settings)

    @app.task(name="add")
    async def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="fail", retry=Retry(max_attempts=2, delay=0.01))
    async def fail() -> None:
        raise ValueError("no")

    @app.task(name="slow")
    async def slow() -> None:
        await asyncio.Event().wait()

    @app.task(name="parent", executor="thread")
    def parent() -> str:
        return app.tasks["add"].delay(1, 1).id

    return app


@asynccontextmanager
async def opened(url: str, **settings: Any) -> AsyncIterator[TaskQueue]:
    async with asyncio.timeout(PATIENCE), application(url, **settings) as app:
        yield app


async def send_all_kinds(app: TaskQueue) -> None:
    add = app.tasks["add"]
    await add.kiq(1, 2)
    await add.with_options(countdown=60).kiq(1, 2)
    await add.with_options(task_id="mine").kiq(1, 2)
    await add.with_options(priority=9, expires=60).kiq(1, 2)
    await app.kiq_many([add.s(1, 2), add.s(3, 4)])
    await app.send("unknown", queue="other")


async def test_a_sender_sends_and_cannot_read_results(user: Callable[[str], str]) -> None:
    async with opened(user("sender"), result_backend="disabled://") as app:
        await send_all_kinds(app)
    keys = ROLES["sender"].keys
    assert not any(key.startswith(("result", "state")) for key in keys)


async def test_a_reader_waits_for_results(user: Callable[[str], str]) -> None:
    async with opened(user("all")) as app, opened(user("reader")) as reader:
        handle = await app.tasks["add"].kiq(1, 2)
        waiting = asyncio.create_task(reader.handle(handle.id).result())
        async with app.worker():
            assert await waiting == 3
        assert await reader.handle(handle.id).result() == 3


async def test_a_client_sends_waits_cancels_and_forgets(user: Callable[[str], str]) -> None:
    async with opened(user("all")) as app, opened(user("client")) as client:
        await send_all_kinds(client)
        waiting = await client.tasks["add"].with_options(countdown=60).kiq(1, 2)
        async with app.worker(queues=["default", "other"]):
            handle = await client.tasks["add"].kiq(1, 2)
            assert await handle.result() == 3
            await handle.status()
            await handle.forget()
            slow = await client.tasks["slow"].kiq()
            await slow.cancel()
            await asyncio.to_thread(client.AsyncResult(waiting.id).revoke)
            for one in (slow, waiting):
                with pytest.raises(TaskRevoked):
                    await one.result()


async def test_a_worker_runs_tasks_that_send_others(user: Callable[[str], str]) -> None:
    async with opened(user("client")) as client, opened(user("worker")) as app:
        await send_all_kinds(client)
        waiting = await client.tasks["add"].with_options(countdown=0.2).kiq(1, 2)
        async with app.worker(queues=["default", "other"], name="w"):
            assert await waiting.result() == 3
            with pytest.raises(TaskFailed):
                await (await client.tasks["fail"].kiq()).result()
            child = await (await client.tasks["parent"].kiq()).result()
            assert await client.handle(str(child)).result() == 2
            slow = await client.tasks["slow"].kiq()
            await slow.cancel()


async def test_a_scheduler_runs_schedules(user: Callable[[str], str]) -> None:
    async with opened(user("all")) as app, opened(user("scheduler")) as timer:
        await app.schedules.add("often", "add", Schedule(0.1, args=[1, 2], overlap="skip"))
        broker = await app.broker()
        async with timer.scheduler():
            while not (await broker.depth()).get("default"):
                await asyncio.sleep(0.01)
        async with app.worker(), timer.scheduler():
            while (await app.schedules.get("often")).runs < 3:  # type: ignore[union-attr]  # it is there
                await asyncio.sleep(0.01)


def test_an_operator_uses_every_command(
    user: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "operated.py").write_text(
        f"from aiotaskq import TaskQueue\napp = TaskQueue('tasks', broker={user('operator')!r})\n"
        "@app.task(name='add')\nasync def add(x: int, y: int) -> int: return x + y\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    async def bury() -> None:
        async with opened(user("all"), unknown_task_ttl=0) as app:
            broker = await app.broker()
            for name in ("a", "b", "c"):
                await broker.publish([Envelope(id=name, queue="default", body=b"{")])
            await app.worker(burst=True).run()

    asyncio.run(bury())
    capfd.readouterr()
    app = "operated:app"
    for words in (
        ["queues", app],
        ["call", app, "add", "1", "2", "--task-id", "mine"],
        ["queues", "purge", app, "default", "--yes"],
        ["dead", "list", app],
        ["dead", "list", app, "--queue", "default", "--json"],
        ["dead", "show", app, "a"],
        ["dead", "discard", app, "a"],
        ["dead", "retry", app, "--all", "--yes"],
        ["dead", "discard", app, "--reason", "x", "--yes"],
        ["schedule", "add", app, "s", "add", "1", "2", "--every", "60"],
        ["schedule", "list", app],
        ["schedule", "show", app, "s"],
        ["schedule", "pause", app, "s"],
        ["schedule", "resume", app, "s"],
        ["schedule", "run", app, "s"],
        ["schedule", "remove", app, "s"],
        ["result", app, "mine"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capfd.readouterr()
        assert (ended.value.code or 0) == (3 if words[0] == "result" else 0), (words, out, err)


@pytest.mark.parametrize("role", ROLES)
def test_no_role_may_do_anything_else(redis_server: RedisServer, redis_url: str, role: str) -> None:
    with redis.Redis(host=redis_server.host, port=redis_server.port) as control:
        rules = ROLES[role].rules()
        control.execute_command("ACL", "SETUSER", role, "reset", "on", ">pass", *rules)
        with redis.Redis(
            host=redis_server.host, port=redis_server.port, username=role, password="pass"
        ) as limited:
            assert limited.execute_command("INFO", "server")
            for line in FORBIDDEN:
                with pytest.raises(redis.ResponseError, match=r"permission|can't"):
                    limited.execute_command(*line.split(" "))
        assert not control.exists("other")
        control.acl_deluser(role)
        control.acl_log_reset()


def test_the_commands_of_the_roles_are_those_that_the_driver_sends() -> None:
    folder = Path(driver.__file__).parent
    sent = {
        word.lower()
        for path in folder.rglob("*.py")
        for word in re.findall(
            r'(?:command\(|words: list\[Word\] = \[|ask\(\s*\w+,)\s*"([A-Z]+)"',
            path.read_text(),
        )
    }
    listed = {word for role in ROLES.values() for word in role.sends}
    listed |= set(cluster_role(ROLES["all"]).sends)
    topology = {"role", "cluster", "sentinel"}
    assert sent - topology - {"config", "info"} == listed  # see the how-to on CONFIG GET
    assert topology - {"sentinel"} <= {
        word.partition("|")[0] for words in TOPOLOGY_COMMANDS.values() for word in words
    }
    loaded = [one for one in vars(scripts).values() if isinstance(one, RedisScript)]
    used = {one.digest for one in cluster_role(ROLES["all"]).scripts}
    assert {one.digest for one in loaded} == used
    lua = "".join(path.read_text() for path in (folder / "lua").glob("*.lua"))
    called = {word.lower() for word in re.findall(r"redis\.p?call\(\s*'([A-Z]+)'", lua)}
    assert called <= set(cluster_role(ROLES["all"]).commands())


def test_the_prefix_is_that_of_the_application() -> None:
    rules = ROLES["worker"].rules("mine")
    assert "~mine:queues" in rules
    assert "&mine:results" in rules
    rules = cluster_role(ROLES["worker"]).rules("mine:{*}", more=TOPOLOGY_COMMANDS["cluster"])
    assert "~mine:{*}:queues" in rules
    assert "&mine:results" in rules
    assert "+cluster|slots" in rules


async def test_a_user_without_the_right_hears_which_one_is_missing(
    user: Callable[[str], str], redis_server: RedisServer
) -> None:
    broker = RedisBroker(user("sender"))
    await broker.open()
    with pytest.raises(Exception, match=r"(?i)permission|can't"):
        await broker.purge("q")
    await broker.close()
    with redis.Redis(host=redis_server.host, port=redis_server.port) as control:
        control.acl_log_reset()
