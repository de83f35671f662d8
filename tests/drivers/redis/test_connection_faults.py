"""The Redis driver with a network and a server that misbehave: replies, connections, memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Self

import pytest
import redis

from aiotaskq.client.publisher import Publisher
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead, Done, Release
from aiotaskq.drivers.redis import RedisBackend, RedisBroker, notify, scripts
from aiotaskq.drivers.redis.connection import RedisConnection
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.drivers.redis.url import parse_url
from aiotaskq.errors import BackendUnavailable, BrokerFull, BrokerUnavailable
from tests.drivers.redis.tools import PATIENCE, envelope, insist, outcome
from tests.servers import RedisServer

# --- connections --------------------------------------------------------------------------------


async def test_cancelled_commands_do_not_mix_up_replies(redis_url: str) -> None:
    connection = RedisConnection(parse_url(redis_url), BrokerUnavailable)
    chance = random.Random(1)
    answered = 0

    async def echo(number: int) -> None:
        nonlocal answered
        assert await connection.command("ECHO", number) == b"%d" % number
        answered += 1

    for start in range(0, 2000, 20):
        tasks = [asyncio.create_task(echo(number)) for number in range(start, start + 20)]
        for _ in range(chance.randrange(8)):
            await asyncio.sleep(0)
        victims = chance.sample(tasks, 10)
        for task in victims:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
    assert answered >= 1000
    assert connection.connects == 1
    await connection.close()


async def test_a_server_that_does_not_answer_is_given_up_and_tried_again(
    redis_server: RedisServer, redis_url: str
) -> None:
    connection = RedisConnection(parse_url(f"{redis_url}?socket_timeout=0.2"), BrokerUnavailable)
    assert await connection.command("PING") == b"PONG"
    redis_server.pause()
    try:
        calls = [connection.command("PING") for _ in range(3)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        redis_server.resume()
    assert {type(one) for one in outcomes} == {BrokerUnavailable}
    assert await insist(connection.command, "PING") == b"PONG"
    await connection.close()


async def test_closing_ends_waiting_commands(redis_server: RedisServer, redis_url: str) -> None:
    connection = RedisConnection(parse_url(redis_url), BrokerUnavailable)
    await connection.command("PING")
    waiting = asyncio.create_task(connection.command("BLPOP", "nothing", 0))
    await asyncio.sleep(0)
    await connection.close()
    with pytest.raises(BrokerUnavailable):
        await waiting
    with pytest.raises(BrokerUnavailable):
        await connection.command("PING")


class Proxy:
    """A proxy between a driver and the server, which loses or delays single messages."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.swallow: bytes | None = None  # replies to requests with it in them are lost
        self.delay: bytes | None = None  # requests with it in them wait for `released`
        self.silent = False  # everything that the server sends is lost
        self.released = asyncio.Event()
        self.late = asyncio.Event()  # a request was delivered that had waited

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._listener is not None
        return f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        from_server, to_server = await asyncio.open_connection(self._server.host, self._server.port)
        back = asyncio.create_task(self._back(from_server, writer))
        try:
            await self._forth(reader, to_server, writer)
        finally:
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            for one in (writer, to_server):
                one.close()
            self._tasks.discard(task)

    async def _forth(
        self,
        reader: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
        to_client: asyncio.StreamWriter,
    ) -> None:
        while data := await reader.read(65536):
            if self.swallow is not None and self.swallow in data:
                self.swallow, self.silent = None, True
                to_server.write(data + b"PING\r\n")
                await to_server.drain()
                await self.released.wait()  # the server has done it
                return
            if self.delay is not None and self.delay in data:
                self.delay = None
                to_client.close()
                await self.released.wait()
                to_server.write(data)
                await to_server.drain()
                await asyncio.sleep(0.1)
                self.late.set()
                return
            to_server.write(data)
            await to_server.drain()

    async def _back(self, reader: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.silent:
                self.silent = False
                self.released.set()
                return
            to_client.write(data)
            await to_client.drain()


@pytest.fixture
async def proxy(redis_server: RedisServer, redis_url: str) -> AsyncIterator[Proxy]:
    async with Proxy(redis_server) as proxy:
        yield proxy


async def test_items_of_a_fetch_whose_reply_was_lost_come_with_the_next(
    proxy: Proxy, broker: RedisBroker
) -> None:
    ours = RedisBroker(proxy.url)
    await ours.open()
    consumer = ours.consumer(["p", "q"], name="w", lease=60.0)
    await consumer.open()
    assert not await consumer.fetch(1, 0)  # so that the script is known
    await broker.publish([envelope(f"{n}") for n in range(5)])
    proxy.swallow = scripts.FETCH.digest
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    assert (await broker.depth())["q"] == Depth(ready=2, held=3)
    got = await insist(consumer.fetch, 2, 0)
    got = [*got, *await consumer.fetch(10, 0), *await consumer.fetch(10, 0)]
    assert [one.id for one in got] == list("01234")
    assert not await consumer.settle([Done(one) for one in got])
    assert await broker.depth() == {}
    await consumer.close()
    await ours.close()


async def test_a_fetch_that_arrives_after_its_successor_takes_nothing(
    proxy: Proxy, broker: RedisBroker
) -> None:
    ours = RedisBroker(proxy.url)
    await ours.open()
    consumer = ours.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    assert not await consumer.fetch(1, 0)
    proxy.delay = scripts.FETCH.digest
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    assert not await insist(consumer.fetch, 3, 0)
    await broker.publish([envelope("a")])
    proxy.released.set()
    async with asyncio.timeout(PATIENCE):
        await proxy.late.wait()
    assert (await broker.depth())["q"] == Depth(ready=1)
    assert [one.id for one in await consumer.fetch(3, 0)] == ["a"]
    await consumer.close()
    await ours.close()


async def test_a_settlement_whose_reply_was_lost_is_not_reported_as_gone_by_the_next(
    proxy: Proxy, broker: RedisBroker
) -> None:
    ours = RedisBroker(proxy.url)
    await ours.open()
    consumer = ours.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    await broker.publish([envelope("a"), envelope("b")])
    a, b = await consumer.fetch(2, 0)
    await consumer.settle([])
    await ours._client.connection.script(scripts.DONE, ["aiotaskq:{q}:"], ["nobody", 1])
    proxy.swallow = scripts.DONE.digest
    with pytest.raises(BrokerUnavailable):
        await consumer.settle([Done(a)])
    assert not await insist(consumer.settle, [Done(a), Done(b)])
    assert await broker.depth() == {}
    # It is known now, and that was all.
    assert [one.id for one in await consumer.settle([Done(a)])] == ["a"]
    await consumer.close()
    await ours.close()


async def test_a_settlement_under_way_during_a_reconnect_is_not_undone(
    broker: RedisBroker, consumer: RedisConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.publish([envelope("a")])
    [a] = await consumer.fetch(1, 0)
    connection = broker._client.connection
    run, over = connection.script, asyncio.Event()

    async def script(script: scripts.RedisScript, keys: list[str], words: list[str]) -> object:
        if script is scripts.DONE:  # as one that is sent on to the node that has the slot now
            await over.wait()
        return await run(script, keys, words)

    monkeypatch.setattr(connection, "script", script)
    settling = asyncio.create_task(consumer.settle([Done(a)]))
    await asyncio.sleep(0)
    connection.drop()
    assert not await consumer.fetch(1, 0)
    assert connection.connects == 2
    assert not await consumer.fetch(1, 0)
    over.set()
    assert not await settling
    assert await broker.depth() == {}


async def test_repeated_calls_write_something_for_wait_to_wait_for(
    broker: RedisBroker, consumer: RedisConsumer, backend: RedisBackend, control: redis.Redis
) -> None:
    connection, base = broker._client.connection, broker._client.keys.base("q")
    parcel = [b"p", b"0", b"0 0 - parcel\n"]
    await broker.publish([envelope("a", unique=True)])
    [a] = await consumer.fetch(1, 0)
    await consumer.settle([Done(a)])
    await backend.store([outcome("a")], 60.0)
    await connection.script(scripts.UNPACK, [base], parcel)

    def written() -> int:
        return int(control.info("persistence")["rdb_changes_since_last_save"])

    before = written()
    assert list(await broker.publish([envelope("a", unique=True)])) == ["a"]
    published = written()
    assert list(await consumer.settle([Done(a)])) == [a]
    settled = written()
    assert list(await backend.store([outcome("a")], 60.0)) == ["a"]
    stored = written()
    assert not await connection.script(scripts.UNPACK, [base], parcel)
    assert before < published < settled < stored < written()
    assert not control.exists("aiotaskq:none", f"{base}none")


async def test_a_settlement_whose_reply_was_lost_is_reported_as_gone_if_the_lease_is_lost(
    proxy: Proxy, broker: RedisBroker
) -> None:
    ours = RedisBroker(proxy.url)
    await ours.open()
    consumer = ours.consumer(["q"], name="w", lease=60.0)
    await consumer.open()
    await broker.publish([envelope("a"), envelope("b")])
    a, b = await consumer.fetch(2, 0)
    await ours._client.connection.script(scripts.DONE, ["aiotaskq:{q}:"], ["nobody", 1])
    proxy.swallow = scripts.DONE.digest
    with pytest.raises(BrokerUnavailable):
        await consumer.settle([Done(a)])
    lease = broker.lease(consumer.grant)
    assert await lease.end("killed") == 1
    await lease.close()
    assert [one.id for one in await insist(consumer.settle, [Done(a), Done(b)])] == ["a", "b"]
    await ours.close()


async def test_an_outcome_whose_reply_was_lost_is_not_reported_as_refused_by_the_next(
    proxy: Proxy, backend: RedisBackend
) -> None:
    ours = RedisBackend(proxy.url)
    await ours.open()
    assert not await ours.store([outcome("known")], None)
    await backend.store([outcome("theirs", TaskStatus.FAILURE)], None)
    batch = [outcome("a"), outcome("theirs")]
    proxy.swallow = scripts.STORE.digest
    with pytest.raises(BackendUnavailable):
        await ours.store(batch, None)
    assert await insist(ours.store, batch, None) == ["theirs"]
    # It is known now, and that was all.
    assert list(await ours.store(batch, None)) == ["a", "theirs"]
    await ours.close()


async def test_a_suspect_whose_reply_was_lost_comes_alone_with_the_next(
    proxy: Proxy, broker: RedisBroker
) -> None:
    await broker.publish([envelope("s")])
    for _ in range(2):
        dying = broker.consumer(["q"], name="w", lease=60.0)
        await dying.open()
        assert len(await dying.fetch(1, 0)) == 1
        lease = broker.lease(dying.grant)
        assert await lease.end("its process was killed:\n100% of memory") == 1
        await lease.close()
    ours = RedisBroker(proxy.url)
    await ours.open()
    consumer = ours.consumer(["p", "q"], name="w", lease=60.0)
    await consumer.open()
    await broker.publish([envelope("a"), envelope("b", queue="p")])
    await ours._client.connection.script(
        scripts.FETCH, ["aiotaskq:{none}:", "x"], [0, "n", 1, 0, ""]
    )
    proxy.swallow = scripts.FETCH.digest
    with pytest.raises(BrokerUnavailable):
        await consumer.fetch(3, 0)
    [got] = await insist(consumer.fetch, 3, 0)
    assert (got.id, got.crashes) == ("s", 2)
    assert got.crash_note == "its process was killed:\n100% of memory"
    assert [one.id for one in await consumer.fetch(3, 0)] == ["b", "a"]
    await consumer.close()
    await ours.close()


async def test_a_subscription_notices_that_its_connection_is_half_open(
    proxy: Proxy, backend: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_SILENCE", 0.1)
    ours = RedisBackend(proxy.url)
    await ours.open()
    outcomes = ours.subscribe()
    async with asyncio.timeout(PATIENCE):
        assert await anext(outcomes) == []
        await backend.store([outcome("a")], None)
        assert await next_ids(outcomes) == ["a"]
        proxy.silent = True  # the connection stays, and nothing comes any more
        while await anext(outcomes) != []:
            pass
        await backend.store([outcome("b")], None)
        assert await next_ids(outcomes) == ["b"]
    await outcomes.aclose()
    await ours.close()


async def next_ids(outcomes: AsyncIterator[Sequence[str | Outcome]]) -> list[str]:
    """Return the ids of the next item that tells of any."""
    while not (found := await anext(outcomes)):
        pass
    return [one if isinstance(one, str) else one.task_id for one in found]


# --- a server that misbehaves under load --------------------------------------------------------


class Load:
    """Publishers and workers that go on while the server is disturbed, and until all is settled."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._quiet = asyncio.Event()  # the disturbances are over
        self._publishers = 2
        self.stored: set[str] = set()
        self.taken: Counter[str] = Counter()
        self.settled: Counter[str] = Counter()

    async def run(self, disturb: Callable[[], Awaitable[None]], times: int) -> None:
        """Work while `disturb` is called so many times, and finish."""
        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for number in range(self._publishers):
                group.create_task(self._publish(number))
            for _ in range(3):
                group.create_task(self._work())
            for _ in range(times):
                settled = self.settled.total()
                await disturb()
                while self.settled.total() == settled:  # all goes on
                    await asyncio.sleep(0.001)
            self._quiet.set()
        assert set(self.taken) == set(self.settled) == self.stored
        assert set(self.taken.values()) == set(self.settled.values()) == {1}

    async def _publish(self, number: int) -> None:
        broker = RedisBroker(self._url)
        await insist(broker.open)
        for call in itertools.count():
            names = [f"{number}.{call}.{n}" for n in range(5)]
            batch = [envelope(name, priority=n) for n, name in enumerate(names)]
            self.stored.update(names)
            await insist(broker.publish, batch, call_id=names[0])
            if self._quiet.is_set():
                break
            while len(self.stored) - len(self.settled) > 100:
                await asyncio.sleep(0.001)
        self._publishers -= 1
        await broker.close()

    async def _work(self) -> None:
        broker = RedisBroker(self._url)
        await insist(broker.open)
        consumer = broker.consumer(["q"], name="w", lease=600.0)
        await insist(consumer.open)
        while self._publishers or len(self.settled) < len(self.stored):
            got = await insist(consumer.fetch, 20, 0.05)
            self.taken.update(one.id for one in got)
            await self._settle(consumer, list(got))
            await insist(broker.maintain)
        await insist(broker.depth)
        await consumer.close()
        await broker.close()

    async def _settle(self, consumer: RedisConsumer, got: list[Delivery]) -> None:
        tries = 0

        async def settle() -> None:
            nonlocal tries
            tries += 1
            gone = await consumer.settle([Done(one) for one in got])
            assert not gone or tries > 1

        await insist(settle)
        self.settled.update(one.id for one in got)


async def test_scripts_flushed_from_the_server_are_sent_again(
    redis_url: str, control: redis.Redis
) -> None:
    async def flush() -> None:
        control.script_flush()

    await Load(redis_url).run(flush, times=300)


async def test_killed_connections_lose_and_duplicate_nothing(
    redis_url: str, control: redis.Redis
) -> None:
    async def kill() -> None:
        control.client_kill_filter(_type="normal", skipme=True)

    await Load(redis_url).run(kill, times=100)


async def test_a_restarted_server_loses_and_duplicates_nothing(
    redis_server: RedisServer, redis_url: str
) -> None:
    async def crash() -> None:
        await asyncio.to_thread(redis_server.kill)
        await asyncio.to_thread(redis_server.start)

    await Load(redis_url).run(crash, times=8)


async def test_calls_that_free_memory_work_on_a_full_server(
    broker: RedisBroker, consumer: RedisConsumer, control: redis.Redis
) -> None:
    await broker.publish([envelope(f"{n}", body=b"x" * 1000) for n in range(20)])
    late = envelope("late", not_before=float(control.time()[0]) + 3600.0)
    [one, two, three] = await consumer.fetch(3, 0)
    dying = broker.consumer(["q"], name="w", lease=60.0)
    await dying.open()
    assert len(await dying.fetch(2, 0)) == 2
    buried = broker.consumer(["q"], name="w", lease=60.0)
    await buried.open()
    [bad, worse] = await buried.fetch(2, 0)
    control.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(BrokerFull, match="maxmemory"):
            await broker.publish([envelope("more")])
        # The sender is told at once, and not when the patience for outages is at its end.
        with pytest.raises(BrokerFull):
            await Publisher(broker, 10 * PATIENCE).publish([envelope("more")])
        assert not await buried.settle([Dead(bad, "why", b"details"), Dead(worse, "why")])
        assert not (await buried.news()).suspects
        lease = broker.lease(dying.grant)
        assert await lease.end("killed") == 2
        await lease.close()
        await broker.cancel(["18"])
        assert await broker.cancel([one.id, "19"], running=False) == {one.id}
        [newer, older] = await broker.dead("q")
        assert not await broker.revive("q", [(older.key, envelope("revived"))])
        assert await broker.discard("q", [newer.key]) == 1
        lease = broker.lease(consumer.grant)
        assert await lease.renew()
        await lease.close()
        other = broker.consumer(["q"], name="w", lease=60.0)
        await other.open()
        assert len(await other.fetch(5, 0)) == 5
        assert not await consumer.settle([Done(one)])
        assert not await consumer.settle([Again(two, late), Release(three)])
        await other.close()
        broker._time_shift = 61.0
        await broker.maintain()
    finally:
        control.config_set("maxmemory", "0")
    assert (await broker.depth())["q"].delayed == 1


async def test_the_errors_of_a_wait_and_of_its_wake_up_are_both_retrieved(
    consumer: RedisConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise asyncio logs an error that was never retrieved, once the server is away."""
    heard: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: heard.append(told))
    woken = asyncio.Event()

    async def wait(seconds: float) -> bool:
        await woken.wait()
        raise BrokerUnavailable("the server closed the connection")

    async def script(*_: object) -> None:
        woken.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        raise BrokerUnavailable("the server closed the connection")

    monkeypatch.setattr(consumer.notifier, "wait", wait)
    with monkeypatch.context() as patched:
        patched.setattr(consumer._client.connection, "script", script)
        with pytest.raises(BrokerUnavailable):
            await consumer.notifier.wait_exactly(0.01)
    gc.collect()
    assert not heard
