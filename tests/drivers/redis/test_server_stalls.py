"""Leases while a Redis server stands still: dead consumers are given up, living ones are not."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest
import redis

from aiotaskq.contract.records import Maintained
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.redis import RedisBroker
from aiotaskq.drivers.redis.consumer import RedisConsumer
from aiotaskq.errors import BrokerUnavailable, LeaseLost
from tests.drivers.redis.tools import PATIENCE, envelope, insist
from tests.servers import RedisServer


@pytest.mark.parametrize("patience", [5.0, 0.3], ids=["patient", "reconnecting"])
async def test_no_living_consumer_is_given_up_when_the_server_stood_still(
    redis_server: RedisServer, redis_url: str, broker: RedisBroker, patience: float
) -> None:
    lease = 1.2
    lives = [await Life.begin(f"{redis_url}?socket_timeout={patience}", lease) for _ in range(3)]
    await broker.publish([envelope(f"{n}") for n in range(3)])
    held = [await insist(one.consumer.fetch, 1, 1.0) for one in lives]
    redis_server.pause()
    try:
        await asyncio.sleep(2 * lease)
    finally:
        redis_server.resume()
    rounds = [one.rounds for one in lives]
    async with asyncio.timeout(PATIENCE):
        while any(one.rounds < before + 5 for one, before in zip(lives, rounds, strict=True)):
            await asyncio.sleep(0.01)
    assert [one.reclaimed for one in lives] == [0, 0, 0]
    for one, [delivery] in zip(lives, held, strict=True):
        assert one.renewed
        assert not await insist(one.consumer.settle, [Done(delivery)])
    # A consumer that really died is given up all the same.
    await broker.publish([envelope("last")])
    await insist(lives[0].consumer.fetch, 1, 1.0)
    await lives[0].end(tidily=False)
    async with asyncio.timeout(PATIENCE):
        while not sum(one.reclaimed for one in lives[1:]):
            await asyncio.sleep(0.01)
    with pytest.raises(LeaseLost):
        await lives[0].consumer.fetch(1, 0)
    for one in lives:
        await one.end()


class Life:
    """A worker that renews its lease and calls `maintain`, as often as its lease needs."""

    def __init__(self, broker: RedisBroker, consumer: RedisConsumer, lease: float) -> None:
        self._broker = broker
        self.consumer = consumer
        self.rounds = 0
        self.reclaimed = 0
        self.renewed = True
        self._tasks = [
            asyncio.create_task(self._renew(lease / 4)),
            asyncio.create_task(self._maintain(lease / 8)),
        ]

    @classmethod
    async def begin(cls, url: str, lease: float) -> Life:
        broker = RedisBroker(url)
        await broker.open()
        consumer = broker.consumer(["q"], name="w", lease=lease)
        await consumer.open()
        return cls(broker, consumer, lease)

    async def end(self, *, tidily: bool = True) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if tidily:
            await self.consumer.close()
            await self._broker.close()

    async def _renew(self, every: float) -> None:
        lease = self._broker.lease(self.consumer.grant)
        try:
            while True:
                with contextlib.suppress(BrokerUnavailable):
                    self.renewed = self.renewed and await lease.renew()
                await asyncio.sleep(every)
        finally:
            await lease.close()

    async def _maintain(self, every: float) -> None:
        while True:
            with contextlib.suppress(BrokerUnavailable):
                self.reclaimed += (await self._broker.maintain()).reclaimed
                self.rounds += 1
            await asyncio.sleep(every)


class Silence:
    """Two consumers whose leases lapsed, one item each, while nobody at all renewed a lease."""

    def __init__(self, broker: RedisBroker, other: RedisBroker, control: redis.Redis) -> None:
        self.broker = broker
        self.other = other  # has no consumer
        self.consumers = [broker.consumer(["q"], name="w", lease=60.0) for _ in range(2)]
        self._control = control

    async def begin(self) -> None:
        for consumer in self.consumers:
            await consumer.open()
            await self.broker.publish([envelope(consumer.id)])
            await consumer.fetch(1, 0)
        await self.go_on()

    async def go_on(self) -> None:
        for broker in (self.broker, self.other):
            broker._time_shift += 61.0
        beat = self._control.time()[0] - 61.0 - random.random()
        self._control.hset("aiotaskq:{q}:meta", "beat", str(beat))

    async def renew(self, number: int) -> bool:
        lease = self.broker.lease(self.consumers[number].grant)
        try:
            return await lease.renew()
        finally:
            await lease.close()


@pytest.fixture
async def silence(
    broker: RedisBroker, redis_url: str, control: redis.Redis
) -> AsyncIterator[Silence]:
    other = RedisBroker(redis_url)
    await other.open()
    silence = Silence(broker, other, control)
    await silence.begin()
    yield silence
    for consumer in silence.consumers:
        await consumer.close()
    await other.close()


async def test_maintain_by_a_living_worker_renews_all_leases_once_after_a_silence(
    silence: Silence,
) -> None:
    assert await silence.broker.maintain() == Maintained()
    assert await silence.other.maintain() == Maintained()
    assert await silence.renew(0)
    assert await silence.renew(1)
    await silence.go_on()
    assert await silence.broker.maintain() == Maintained()
    for broker in (silence.broker, silence.other):
        broker._time_shift += 61.0  # and still nobody renews
    assert await silence.broker.maintain() == Maintained(reclaimed=2)


async def test_the_first_renewal_after_a_silence_renews_all_leases(silence: Silence) -> None:
    assert await silence.renew(0)
    assert await silence.other.maintain() == Maintained()
    assert await silence.renew(1)


async def test_a_broker_that_lost_its_connection_itself_gives_nobody_up(
    silence: Silence,
) -> None:
    silence.other._client.connection.failed_at = asyncio.get_running_loop().time()
    assert await silence.other.maintain() == Maintained()
    assert await silence.renew(1)


async def test_a_broker_without_consumers_gives_silent_consumers_up(silence: Silence) -> None:
    assert await silence.other.maintain() == Maintained(reclaimed=2)
    assert not await silence.renew(0)


async def test_a_call_of_maintain_that_is_out_of_date_does_nothing(silence: Silence) -> None:
    silence.other._clock_offset -= 10.0  # as if the call had lain in a buffer
    assert await silence.other.maintain() == Maintained()
    assert await silence.other.maintain() == Maintained(reclaimed=2)
