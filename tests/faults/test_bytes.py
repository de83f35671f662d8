"""T24: a connection that ends at any byte of a driver's command or of its reply.

Each command goes through the proxy, is broken at one byte, and is repeated until it succeeds, as
workers and publishers do. Then the store must be as after one undisturbed call.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import pytest
from msgspec import Raw

from aiotaskq.contract.broker import Consumer
from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.records import Depth
from aiotaskq.contract.results import ResultBackend
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.postgres import PostgresBackend
from aiotaskq.drivers.redis import RedisBackend, RedisBroker
from aiotaskq.errors import Unavailable
from tests.faults.proxy import End, Proxy, Way
from tests.faults.scene import LONG_PROFILE

PATIENCE = 120.0
BODY = b"a body of some length, so that there is something to cut " * 4
LEASE = 60.0
POINTS = 25  # for each direction of each command; all bytes in the long profile

Action: TypeAlias = Callable[[], Awaitable[object]]
Case: TypeAlias = AsyncGenerator[Action, None]


class Rig:
    """Drivers behind a proxy, and others that read the store directly."""

    def __init__(self, make: Callable[[str], ResultBackend], url: str, broker_url: str) -> None:
        host, port = urlsplit(url).hostname, urlsplit(url).port
        assert host is not None
        assert port is not None
        self.proxy = Proxy((host, port))
        self.proxy.start()
        self.backend = make(url.replace(f":{port}/", f":{self.proxy.port}/"))
        self.results = make(url)
        self.broker = RedisBroker(broker_url.replace(f":{port}/", f":{self.proxy.port}/"))
        self.direct = RedisBroker(broker_url)
        self._numbers = itertools.count()
        self._consumers: list[Consumer] = []

    async def open(self) -> None:
        for backend in (self.backend, self.results):
            await backend.open()
        for broker in (self.broker, self.direct):
            await broker.open()

    async def close(self) -> None:
        for consumer in self._consumers:
            await consumer.close()
        for broker in (self.broker, self.direct):
            await broker.close()
        for backend in (self.backend, self.results):
            await backend.close()
        self.proxy.close()

    def envelopes(self, count: int = 5, **fields: Any) -> list[Envelope]:
        """Return new drivers."""
        return [
            Envelope(id=f"task-{next(self._numbers)}", queue="q", body=BODY, **fields)
            for _ in range(count)
        ]

    async def consumer(self, broker: RedisBroker, lease: float = LEASE) -> Consumer:
        """Return an open consumer, which is closed at the end."""
        consumer = broker.consumer(["q"], name="w", lease=lease)
        await consumer.open()
        self._consumers.append(consumer)
        return consumer

    async def held(self, count: int = 6) -> tuple[Consumer, list[Delivery]]:
        """Return a consumer behind the proxy, and the deliveries that it holds."""
        await self.direct.publish(self.envelopes(count))
        consumer = await self.consumer(self.broker)
        return consumer, list(await consumer.fetch(count, 0))

    async def is_stored_once(self, batch: list[Envelope]) -> None:
        """Check the waiting messages, and settle them."""
        depth = (await self.direct.depth())["q"]
        assert depth == Depth(ready=len(batch)), depth
        consumer = await self.consumer(self.direct)
        got = await consumer.fetch(2 * len(batch), 0)
        assert [one.id for one in got] == [one.id for one in batch]
        assert all(one.body == BODY for one in got)
        await consumer.settle([Done(one) for one in got])
        await self.is_empty()

    async def is_empty(self) -> None:
        assert await self.direct.depth() == {}


async def publish(rig: Rig) -> Case:
    batch = rig.envelopes()
    call_id = f"call-{batch[0].id}"
    yield lambda: rig.broker.publish(batch, call_id=call_id)
    await rig.is_stored_once(batch)


async def publish_over_a_new_connection(rig: Rig) -> Case:
    batch = rig.envelopes(2)
    call_id = f"call-{batch[0].id}"
    rig.proxy.cut()
    while rig.proxy.live:
        await asyncio.sleep(0)
    yield lambda: rig.broker.publish(batch, call_id=call_id)
    await rig.is_stored_once(batch)


async def publish_unique(rig: Rig) -> Case:
    batch = rig.envelopes(unique=True)
    yield lambda: rig.broker.publish(batch)  # unique ids alone make a repeat safe
    await rig.is_stored_once(batch)


async def fetch(rig: Rig) -> Case:
    batch = rig.envelopes()
    await rig.direct.publish(batch)
    consumer = await rig.consumer(rig.broker)
    got: list[Delivery] = []

    async def take() -> None:
        while len(got) < len(batch):
            got.extend(await consumer.fetch(len(batch), 0))

    yield take
    assert Counter(one.id for one in got) == Counter(one.id for one in batch)
    assert not await consumer.settle([Done(one) for one in got])
    await rig.is_empty()


async def settle_done(rig: Rig) -> Case:
    consumer, held = await rig.held()
    yield lambda: consumer.settle([Done(one) for one in held])
    await rig.is_empty()


async def settle_all_kinds(rig: Rig) -> Case:
    consumer, held = await rig.held()
    again = rig.envelopes(2)
    settlements: list[Settlement] = [
        Again(held[0], again[0]),
        Release(held[1]),
        Dead(held[2], "no good"),
        Again(held[3], again[1]),
        Done(held[4]),
        Done(held[5]),
    ]
    yield lambda: consumer.settle(settlements)
    assert (await rig.direct.depth())["q"] == Depth(ready=3, dead=1)
    (letter,) = await rig.direct.dead("q")
    assert (letter.id, letter.body, letter.reason) == (held[2].id, BODY, "no good")
    taker = await rig.consumer(rig.direct)
    got = await taker.fetch(10, 0)
    assert Counter(one.id for one in got) == Counter([held[1].id, again[0].id, again[1].id])
    assert [one.crashes for one in got] == [0, 0, 0]
    await taker.settle([Done(one) for one in got])
    await rig.direct.discard("q", [letter.key])
    await rig.is_empty()


async def store(rig: Rig) -> Case:
    (one,) = rig.envelopes(1)
    first = [
        Outcome(task_id=f"{one.id}-{n}", status=TaskStatus.SUCCESS, result=Raw(b"[%d]" % n))
        for n in range(4)
    ]
    yield lambda: rig.backend.store(first, 60.0)
    ids = {outcome.task_id for outcome in first}
    later = [Outcome(task_id=i, status=TaskStatus.FAILURE, result=Raw(b"{}")) for i in ids]
    assert set(await rig.results.store(later, 60.0)) == ids
    found = await rig.results.load(ids)
    assert {i: bytes(found[i].result) for i in ids} == {
        outcome.task_id: bytes(outcome.result) for outcome in first
    }


async def load(rig: Rig) -> Case:
    (one,) = rig.envelopes(1)
    outcome = Outcome(task_id=one.id, status=TaskStatus.SUCCESS, result=Raw(b'"%s"' % BODY))
    await rig.results.store([outcome], 60.0)
    found: list[Outcome] = []

    async def look() -> None:
        found.extend((await rig.backend.load([one.id, "nobody"])).values())

    yield look
    assert [(o.task_id, bytes(o.result)) for o in found] == [(one.id, bytes(outcome.result))]


async def renew(rig: Rig) -> Case:
    consumer, held = await rig.held(1)
    lease = rig.broker.lease(consumer.grant)
    assert await lease.renew()  # it is connected then
    answers: list[bool] = []

    async def beat() -> None:
        answers.append(await lease.renew())

    yield beat
    assert answers == [True]
    assert await lease.renew()
    await lease.close()
    assert not await consumer.settle([Done(one) for one in held])
    await rig.is_empty()


async def open_and_close(rig: Rig) -> Case:
    batch = rig.envelopes()
    await rig.direct.publish(batch)
    consumer = rig.broker.consumer(["q"], name="w", lease=LEASE)

    async def live() -> None:
        await consumer.open()
        await consumer.fetch(3, 0)
        await consumer.close()

    yield live
    # After a lost `close` the messages stay until the lease ends, as it does here.
    lease = rig.direct.lease(consumer.grant)
    await lease.end("closed")
    await lease.close()
    depth = (await rig.direct.depth())["q"]
    assert depth == Depth(ready=len(batch)), depth
    await rig.direct.purge("q")
    await rig.is_empty()


async def tend_promotes(rig: Rig) -> Case:
    batch = rig.envelopes(delay=0.0)
    late = rig.envelopes(delay=0.001)
    await rig.direct.publish([*batch, *late])
    await asyncio.sleep(0.002)

    async def maintain() -> None:
        while (await rig.broker.depth())["q"].delayed:
            await rig.broker.maintain()

    yield maintain
    await rig.is_stored_once([*batch, *late])


async def end_of_lease(rig: Rig) -> Case:
    consumer, held = await rig.held(5)
    lease = rig.broker.lease(consumer.grant)
    assert await lease.renew()
    yield lambda: lease.end("it was killed")
    await lease.close()
    taker = await rig.consumer(rig.direct)
    got = await taker.fetch(10, 0)
    assert sorted(one.id for one in got) == sorted(one.id for one in held)
    assert {one.crashes for one in got} == {1}
    assert {one.id for one in await consumer.settle([Done(one) for one in held])} == {
        one.id for one in held
    }
    await taker.settle([Done(one) for one in got])
    await rig.is_empty()


async def cancel(rig: Rig) -> Case:
    batch = rig.envelopes(4)
    await rig.direct.publish(batch)
    yield lambda: rig.broker.cancel([one.id for one in batch[::2]])
    taker = await rig.consumer(rig.direct)
    got = await taker.fetch(10, 0)
    assert [one.id for one in got] == [one.id for one in batch[1::2]]
    await taker.settle([Done(one) for one in got])
    await rig.is_empty()


async def revive(rig: Rig) -> Case:
    consumer, held = await rig.held(2)
    await consumer.settle([Dead(one, "no good") for one in held])
    letters = await rig.direct.dead("q")
    fresh = [Envelope(id=letter.id, queue="q", body=BODY) for letter in letters]
    pairs = [(letter.key, envelope) for letter, envelope in zip(letters, fresh, strict=True)]
    yield lambda: rig.broker.revive("q", pairs)
    await rig.is_stored_once(fresh)


async def store_over_a_new_connection(rig: Rig) -> Case:
    rig.proxy.cut()
    while rig.proxy.live:
        await asyncio.sleep(0)
    async for action in store(rig):
        yield action


BROKER_CASES = [
    publish,
    publish_unique,
    publish_over_a_new_connection,
    fetch,
    settle_done,
    settle_all_kinds,
    renew,
    open_and_close,
    tend_promotes,
    end_of_lease,
    cancel,
    revive,
]
BACKEND_CASES = [store, load, store_over_a_new_connection]


@pytest.fixture
async def rig(redis_url: str) -> AsyncIterator[Rig]:
    rig = Rig(RedisBackend, redis_url, redis_url)
    await rig.open()
    yield rig
    await rig.close()


@pytest.fixture
async def postgres_rig(redis_url: str, postgres_url: str) -> AsyncIterator[Rig]:
    rig = Rig(PostgresBackend, postgres_url, redis_url)
    await rig.open()
    yield rig
    await rig.close()


async def insist(action: Action) -> None:
    """Repeat a call until it succeeds."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(Unavailable):
                await action()
                return
            await asyncio.sleep(0)


async def length(rig: Rig, case: Callable[[Rig], Case]) -> dict[Way, int]:
    """Run a case without a fault; return the number of bytes of its command."""
    steps = case(rig)
    action = await anext(steps)
    before = dict(rig.proxy.passed)
    await insist(action)
    lengths = {way: rig.proxy.passed[way] - before[way] for way in Way}
    assert not [step async for step in steps]
    return lengths


async def break_everywhere(rig: Rig, case: Callable[[Rig], Case], chance: random.Random) -> None:
    await length(rig, case)  # scripts are sent in full the first time
    lengths = await length(rig, case)
    for way in Way:
        assert lengths[way]
        stride = 1 if LONG_PROFILE else max(1, lengths[way] // POINTS)
        for at in range(chance.randrange(stride), lengths[way], stride):
            steps = case(rig)
            action = await anext(steps)
            broken = rig.proxy.broken
            rig.proxy.break_after(at, way, chance.choice(list(End)))
            await insist(action)
            # Names and times differ in length, so the last bytes may be missing.
            assert rig.proxy.broken == broken + 1 or at >= lengths[way] - 20
            rig.proxy.heal()
            assert not [step async for step in steps]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [*BROKER_CASES, *BACKEND_CASES], ids=lambda case: case.__name__)
async def test_t24_a_command_to_redis_broken_at_any_byte(
    rig: Rig, case: Callable[[Rig], Case], chance: random.Random
) -> None:
    await break_everywhere(rig, case, chance)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", BACKEND_CASES, ids=lambda case: case.__name__)
async def test_t24_a_command_to_postgres_broken_at_any_byte(
    postgres_rig: Rig, case: Callable[[Rig], Case], chance: random.Random
) -> None:
    await break_everywhere(postgres_rig, case, chance)
