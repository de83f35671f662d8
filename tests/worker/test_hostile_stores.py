"""A worker and callers beside entries that no program of this package has written."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import asyncpg
import msgspec
import pytest

import aiotaskq.drivers.postgres  # noqa: F401 - now, since its first import reads files
from aiotaskq import TaskFailed, TaskHandle, TaskQueue
from aiotaskq.client.waiters import Waiters
from aiotaskq.contract.message import Attempt, Envelope, Message
from aiotaskq.contract.records import ConsumerInfo, DeadLimits
from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker
from aiotaskq.encoding.codec import Codec
from aiotaskq.errors import DecodeError
from aiotaskq.testing.conformance.result_listener import outcome
from aiotaskq.worker import census
from tests.servers import PostgresServer
from tests.worker.events import LONG, until


@pytest.fixture
async def app() -> AsyncIterator[TaskQueue]:
    app = TaskQueue("app", broker=MemoryBroker())
    yield app
    await app.close()


def body(**fields: object) -> bytes:
    return msgspec.json.encode({"id": "a", "task": "nobody.knows", **fields})


async def test_very_many_unknown_names_write_few_lines(
    app: TaskQueue, caplog: pytest.LogCaptureFixture
) -> None:
    app.conf.update(unknown_task_ttl=0.01)
    caplog.set_level(logging.ERROR)
    count = 1500
    broker = await app.broker()
    await broker.publish(
        [
            Envelope(id=f"{n}", queue="default", body=body(id=f"{n}", task=f"unknown.{n}"))
            for n in range(count)
        ]
    )
    async with app.worker(concurrency=100) as worker:
        await until(lambda: worker.health.counts["buried"] == count)
        assert worker.health.counts["unknown"] >= count
    assert 100 < len(caplog.records) < 300


async def test_a_body_larger_than_the_limit_goes_to_the_dead_letters_unread(
    app: TaskQueue,
) -> None:
    app.conf.update(max_payload_size=10_000)
    runs = []

    @app.task(name="good")
    async def good(text: str) -> int:
        runs.append(text)
        return len(text)

    broker = await app.broker()
    large = body(id="large", task="good", args=["x" * 10_000])
    await broker.publish([Envelope(id="large", queue="default", body=large)])
    async with app.worker():
        handle = await good.kiq("fine")
        assert await handle.result(timeout=LONG) == 4
        with pytest.raises(TaskFailed, match="max_payload_size"):
            await TaskHandle("large", app, "good").result(timeout=LONG)
    assert runs == ["fine"]
    [letter] = await app.dead.list()
    assert "not read" in letter.reason
    assert "x" * 100 in letter.args  # people may look at it all the same


def test_what_a_worker_adds_to_a_message_does_not_count() -> None:
    codec = Codec(max_payload=1000)
    message = Message(id="a", task="t", args=msgspec.Raw(b'["' + b"x" * 900 + b'"]'))
    sent = codec.encode_message(message)
    history = (Attempt(number=1, at=1.0, worker="w", error="e", traceback="t" * 2000),)
    again = codec.encode_again(msgspec.structs.replace(message, history=history), sent)
    assert codec.decode_message(again).history == history
    with pytest.raises(DecodeError, match="not read"):
        codec.decode_message(codec.encode_again(message, sent) + b" " * 1000)
    with pytest.raises(DecodeError, match="not read"):
        codec.decode_message(again + b" " * 2**20)


class ForgedBroker(MemoryBroker):
    async def consumers(self) -> Sequence[ConsumerInfo]:
        deep = b'{"name":"x","more":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        return [
            *(await super().consumers()),
            *(
                ConsumerInfo(id="x", queues=("q",), about=about)
                for about in (deep, b"\xff", b"", b"[1]", b'{"tasks": 5}')
            ),
        ]


async def test_descriptions_of_consumers_that_are_none_are_skipped() -> None:
    broker = ForgedBroker()
    others = census.Census(broker, "me")
    others.note_unknown()
    await others.take()
    assert not others.knows("q", "t")
    app = TaskQueue("app", broker=broker)
    assert await app.workers() == []
    await app.close()


class FaultyBackend(MemoryBackend):
    """A backend whose first subscription ends with a fault of the driver's own."""

    failed = False

    async def subscribe(self) -> AsyncGenerator[Sequence[str], None]:
        if not self.failed:
            self.failed = True
            raise RecursionError("too deep")
        async for news in super().subscribe():
            yield news


async def test_a_fault_of_a_subscription_fails_no_waiter() -> None:
    backend = FaultyBackend()
    waiters = Waiters(backend)
    waiting = asyncio.create_task(waiters.wait("a"))
    await until(lambda: backend.failed)
    await backend.store([outcome("a")], None)
    async with asyncio.timeout(LONG):
        assert (await waiting).task_id == "a"
    await waiters.close()


async def test_rounds_of_maintenance_follow_at_once_where_there_is_more(app: TaskQueue) -> None:
    broker = await app.broker()
    rounds: list[int] = []
    maintain = broker.maintain

    async def counting(limits: DeadLimits = DeadLimits()) -> object:  # noqa: B008 - frozen
        done = await maintain(limits)
        rounds.append(done.trimmed)
        # As if there were very many.
        return msgspec.structs.replace(done, trimmed=1000 if len(rounds) < 20 else 0)

    app.drivers = lambda: (broker, None)  # type: ignore[method-assign]  # the one that counts
    broker.maintain = counting  # type: ignore[method-assign,assignment]  # likewise
    async with app.worker() as worker:
        await until(lambda: len(rounds) >= 20)
        assert worker.health.counts["trimmed"] == 19_000


async def test_a_worker_without_a_connection_for_its_lease_takes_nothing(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    name = postgres_url.rpartition("/")[2]
    role = f"limited_{name}"
    postgres_server.sql(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 3")
    postgres_server.sql(f"GRANT ALL ON SCHEMA public TO {role}", database=name)
    url = postgres_url.replace(f"{postgres_server.user}@", f"{role}@")
    app = TaskQueue("app", broker=url, backend="disabled://")
    runs: list[int] = []

    @app.task
    async def count() -> None:
        runs.append(1)

    await count.kiq()  # one connection of the three, which stays
    taken = [await asyncpg.connect(url)]
    async with app.worker() as worker:  # its consumer has the third one
        await until(lambda: bool(worker.health.problems))
        assert "too many connections" in worker.health.problems[0]
        assert not runs
        await app.close()
        await taken[0].close()
        await until(lambda: bool(runs))
    await app.close()
    assert runs == [1]
    postgres_server.drop_database(name)
    postgres_server.sql(f"DROP ROLE {role}")
