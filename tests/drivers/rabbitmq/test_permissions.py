"""Users that have no more than the permissions that the how-to gives them."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from aiotaskq import Reject, RetryLater, TaskQueue, current_task
from aiotaskq.errors import BatchRefused, ConfigError, TaskRevoked
from tests.servers import RabbitServer

PATIENCE = 30.0
HOW_TO = Path(__file__).parents[3] / "docs" / "how-to" / "rabbitmq.md"


def erlang(text: str) -> str:
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"


def documented() -> dict[str, list[str]]:
    """Return the permissions to configure, write and read, by user."""
    commands = re.findall(r"^rabbitmqctl set_permissions .*$", HOW_TO.read_text(), re.MULTILINE)
    return {user: texts for _, _, user, *texts in map(shlex.split, commands)}


PERMISSIONS = documented()


@pytest.fixture(scope="module")
def users(rabbit_server: RabbitServer) -> Iterator[Callable[[str, str], str]]:
    """Returns the URL of a user with the documented permissions, for a prefix."""
    rabbit_server.start()
    made: list[str] = []
    by = erlang("a test")

    def make(user: str, prefix: str) -> str:
        name = f"{user}-{prefix}"
        given = [erlang(text.replace("aiotaskq", prefix)) for text in PERMISSIONS[user]]
        internal = "rabbit_auth_backend_internal"
        rabbit_server.evaluate(f"{internal}:add_user({erlang(name)}, {erlang(name)}, {by})")
        rabbit_server.evaluate(
            f"{internal}:set_permissions({erlang(name)}, {erlang('/')}, {', '.join(given)}, {by})"
        )
        made.append(name)
        return rabbit_server.url(user=name, password=name)

    yield make
    for name in made:
        rabbit_server.evaluate(f"rabbit_auth_backend_internal:delete_user({erlang(name)}, {by})")


def application(url: str, prefix: str) -> TaskQueue:
    app = TaskQueue("t", broker=url, prefix=prefix)

    @app.task(name="double", queue="q")
    async def double(number: int) -> int:
        return 2 * number

    @app.task(name="twice", queue="q")
    async def twice() -> int:
        if current_task().attempt < 2:
            raise RetryLater(0.01)
        return current_task().attempt

    @app.task(name="wrong", queue="q")
    async def wrong() -> None:
        raise Reject

    return app


@pytest.fixture
async def worker(users: Callable[[str, str], str], prefix: str) -> AsyncIterator[None]:
    app = application(users("worker", prefix), prefix)
    async with app, app.worker(queues=["q"]):
        yield


def test_permissions_of_all_users_are_documented() -> None:
    assert set(PERMISSIONS) == {"submitter", "sender", "caller", "worker", "operator"}
    assert not [one for texts in PERMISSIONS.values() for one in texts if not one.startswith("^")]


async def test_a_caller_sends_waits_and_cancels(
    users: Callable[[str, str], str], prefix: str, worker: None
) -> None:
    app = application(users("caller", prefix), prefix)
    async with app:
        handle = await app.send("double", (2,))
        assert await handle.result(timeout=PATIENCE) == 4
        later = await app.tasks["double"].with_options(countdown=0.05).kiq(3)
        assert await later.result(timeout=PATIENCE) == 6
        assert await (await app.send("twice", ())).result(timeout=PATIENCE) == 2
        waiting = await app.tasks["double"].with_options(countdown=3600).kiq(3)
        await waiting.cancel()
        with pytest.raises(TaskRevoked):
            await waiting.result(timeout=PATIENCE)


async def test_a_sender_makes_queues_and_sends_and_reads_no_result(
    users: Callable[[str, str], str], prefix: str
) -> None:
    app = TaskQueue("t", broker=users("sender", prefix), prefix=prefix, backend="disabled://")

    @app.task(name="double", queue="q")
    async def double(number: int) -> None: ...

    async with app:
        await double.kiq(1)
        await double.with_options(countdown=0.01).kiq(1)
        with pytest.raises(ConfigError, match="lacks a permission"):
            await (await app.broker()).depth()


async def test_a_submitter_sends_to_queues_that_there_are_and_no_others(
    users: Callable[[str, str], str], prefix: str, worker: None
) -> None:
    caller = application(users("caller", prefix), prefix)
    app = TaskQueue("t", broker=users("submitter", prefix), prefix=prefix, backend="disabled://")

    @app.task(name="double", queue="q")
    async def double(number: int) -> None: ...

    async with app, caller:
        await double.kiq(1)
        with pytest.raises((ConfigError, BatchRefused), match="lacks a permission"):
            await double.with_options(queue="another").kiq(1)
        handle = await caller.send("double", (2,))
        assert await handle.result(timeout=PATIENCE) == 4


async def test_an_operator_looks_and_manages_dead_letters(
    users: Callable[[str, str], str], prefix: str, worker: None
) -> None:
    caller = application(users("caller", prefix), prefix)
    app = TaskQueue("t", broker=users("operator", prefix), prefix=prefix, backend="disabled://")
    async with caller, app:
        broker = await app.broker()
        for _ in range(2):
            await caller.send("wrong", ())
        async with asyncio.timeout(PATIENCE):
            while (depth := await broker.depth()).get("q") is None or depth["q"].dead < 2:
                await asyncio.sleep(0.05)
        assert len(await app.workers()) == 1
        first, second = await broker.dead("q")
        assert await broker.discard("q", [first.key]) == 1
        assert await app.dead.retry(id=second.id) == 1
        await broker.purge("q")
        await broker.maintain()
