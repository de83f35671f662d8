"""Conformance tests of opening, closing and cloning a broker."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from aiotaskq.contract.broker import Broker, Traits, Transactional
from aiotaskq.contract.results import ReplyBackend
from aiotaskq.testing.conformance.harness import BrokerHarness
from aiotaskq.testing.conformance.result_listener import outcome, value
from aiotaskq.testing.conformance.rig import (
    PATIENCE,
    BrokerSuite,
    Rig,
    envelope,
    ids_of,
    on_another_loop,
)


class LifecycleTests(BrokerSuite):
    """Opening, closing and cloning a broker, and the data of its class."""

    async def test_opening_and_closing_twice_is_harmless(self, harness: BrokerHarness) -> None:
        broker = await harness.broker()
        await broker.open()
        await broker.publish([envelope("a")])
        await broker.close()
        await broker.close()

    async def test_a_clone_is_closed_and_works_on_the_same_store(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.publish("a")
        clone = broker.clone()
        assert type(clone) is type(broker)
        assert clone.url == broker.url
        await clone.close()  # a driver that is not open may be closed
        await clone.open()
        consumer = await rig.consumer(broker=clone)
        await clone.publish([envelope("b")])
        assert await rig.finish(consumer, 2) == ["a", "b"]
        await consumer.close()
        await clone.close()
        await rig.publish("c")  # the original is still open
        assert (await rig.depth()).ready == 1

    async def test_a_clone_works_on_another_event_loop(self, rig: Rig, broker: Broker) -> None:
        clone = broker.clone()

        async def publish() -> None:
            await clone.open()
            await clone.publish([envelope("a")])
            await clone.close()

        consumer = await rig.consumer()
        waiting = asyncio.create_task(consumer.fetch(1, 2 * PATIENCE))
        await on_another_loop(publish())
        async with asyncio.timeout(PATIENCE):
            assert ids_of(await waiting) == ["a"]

    async def test_the_backend_of_a_broker_is_closed_and_keeps_results_in_its_store(
        self, rig: Rig, broker: Broker
    ) -> None:
        backend = broker.backend()
        if backend is None:
            return
        await backend.close()  # a driver that is not open may be closed
        await backend.open()
        assert not await backend.store([outcome("a", value=1)], None)
        other = (await rig.harness.broker()).backend()
        assert other is not None
        assert type(other) is type(backend)
        await other.open()
        reader = backend if isinstance(backend, ReplyBackend) else other
        assert value((await reader.load(["a"]))["a"]) == 1
        await backend.close()
        await other.close()
        await rig.publish("b")  # the broker is still open
        assert await rig.finish(await rig.consumer(), 1) == ["b"]

    async def test_the_url_shows_no_password(self, broker: Broker) -> None:
        password = urlsplit(broker.url).password
        assert password is None or set(password) <= {"*"}

    async def test_traits_are_data_of_the_class(self, broker: Broker) -> None:
        assert isinstance(type(broker).traits, Traits)
        assert isinstance(broker, Transactional) is broker.traits.transactional
