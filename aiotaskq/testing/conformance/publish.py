"""Conformance tests of `Broker.publish`: batches, repeated calls and unique ids."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead, Release
from aiotaskq.testing.conformance.rig import (
    BrokerSuite,
    Rig,
    done,
    envelope,
    expect_nothing,
    ids_of,
    needs,
)

ODD_NAMES = [
    "two words",
    "grüße-日本-🐇",
    "a:b::c",
    "{brace}",
    "'; drop table x; --",
    "100%s *?[x]",
    "tab\tline\n",
    "x" * 150,
    "UPPER",
    "upper",
]


class PublishTests(BrokerSuite):
    """`Broker.publish`: batches, names, payloads and repeated calls."""

    async def test_an_empty_batch_stores_nothing(self, rig: Rig, broker: Broker) -> None:
        assert not await broker.publish([])
        assert not await broker.publish([], call_id="c")
        assert await broker.depth() == {}

    async def test_a_message_of_another_client_is_received_unchanged(self, rig: Rig) -> None:
        _, [got] = await rig.hold("a", body=b"payload")
        assert (got.id, got.queue, got.body, got.crashes) == ("a", "q", b"payload", 0)

    async def test_order_is_kept_within_and_between_batches(self, rig: Rig) -> None:
        first = [f"a{n}" for n in range(50)]
        second = [f"b{n}" for n in range(50)]
        await rig.publish(*first)
        await rig.publish(*second)
        assert await rig.finish(await rig.consumer(), 100) == first + second

    async def test_one_batch_fills_several_queues_in_order(self, rig: Rig, broker: Broker) -> None:
        batch = [envelope(f"{n}", queue="odd" if n % 2 else "even") for n in range(10)]
        await broker.publish(batch)
        assert await rig.finish(await rig.consumer("odd"), 5) == list("13579")
        assert await rig.finish(await rig.consumer("even"), 5) == list("02468")

    async def test_ten_thousand_envelopes_fit_in_one_batch(self, rig: Rig) -> None:
        ids = [f"m{n}" for n in range(10_000)]
        await rig.publish(*ids)
        assert (await rig.depth()).ready == 10_000
        consumer = await rig.consumer()
        got = await rig.receive(consumer, 10_000)
        assert ids_of(got) == ids
        assert not await consumer.settle([done(one) for one in got])
        assert await rig.depth() == Depth()

    @pytest.mark.parametrize(
        "body",
        [b"", b"\x00", b"a b\r\nc\x00\n", bytes(range(256)), b"\xff\xfe", b"x" * 2**20],
        ids=["empty", "nul", "lines", "every byte", "no text", "one MiB"],
    )
    async def test_any_bytes_are_a_body(self, rig: Rig, body: bytes) -> None:
        consumer, [got] = await rig.hold("a", body=body)
        assert got.body == body
        assert not await consumer.settle([Again(got, envelope("a", body=body + b"\n"))])
        [got] = await rig.receive(consumer, 1)
        assert got.body == body + b"\n"
        await consumer.settle([Dead(got, "why")])
        [letter] = await (await rig.broker()).dead("q")
        assert letter.body == body + b"\n"

    async def test_any_name_is_a_queue(self, rig: Rig, broker: Broker) -> None:
        await broker.publish([envelope(f"{n}", queue=q) for n, q in enumerate(ODD_NAMES)])
        assert await broker.depth() == {queue: Depth(ready=1) for queue in ODD_NAMES}
        for number, queue in enumerate(ODD_NAMES):
            consumer = await rig.consumer(queue)
            [got] = await rig.receive(consumer, 1)
            assert (got.id, got.queue) == (str(number), queue)
            await consumer.settle([Dead(got, queue)])
            await expect_nothing(consumer)
            [letter] = await broker.dead(queue)
            assert (letter.queue, letter.reason) == (queue, queue)

    async def test_any_text_is_an_id(self, rig: Rig, broker: Broker) -> None:
        consumer, held = await rig.hold(*ODD_NAMES)
        assert ids_of(held) == ODD_NAMES
        await consumer.settle([Release(one) for one in held])
        await broker.cancel(ODD_NAMES[:5])
        assert await rig.finish(consumer, 5) == ODD_NAMES[5:]

    async def test_an_id_that_is_not_unique_may_be_stored_twice(self, rig: Rig) -> None:
        await rig.publish("a", "a")
        await rig.publish("a")
        assert await rig.finish(await rig.consumer(), 3) == ["a", "a", "a"]

    @pytest.mark.usefixtures("needs_idempotence")
    async def test_a_call_may_be_repeated(self, rig: Rig, broker: Broker) -> None:
        batch = [envelope("a"), envelope("b", queue="p"), envelope("c", not_before=1.0)]
        for _ in range(3):
            assert not await broker.publish(batch, call_id="call 1")
        assert not await (await rig.harness.broker()).publish(batch, call_id="call 1")
        assert sorted(await rig.finish(await rig.consumer("p", "q"), 3)) == ["a", "b", "c"]

    @pytest.mark.usefixtures("needs_idempotence", "needs_clock")
    async def test_a_call_may_be_repeated_for_a_minute(self, rig: Rig, broker: Broker) -> None:
        for _ in range(2):
            await broker.publish([envelope("a")], call_id="call 1")
            await rig.harness.pass_time(55.0)
        assert await rig.finish(await rig.consumer(), 1) == ["a"]

    async def test_a_repeated_call_stores_nothing_after_its_messages_are_done(
        self, rig: Rig, broker: Broker
    ) -> None:
        await broker.publish([envelope("a")], call_id="call 1")
        consumer = await rig.consumer()
        assert await rig.finish(consumer, 1) == ["a"]
        await broker.publish([envelope("a")], call_id="call 1")
        await expect_nothing(consumer)

    async def test_different_calls_are_told_apart(self, rig: Rig, broker: Broker) -> None:
        await broker.publish([envelope("a")], call_id="call 1")
        await broker.publish([envelope("a")], call_id="call 2")
        assert await rig.finish(await rig.consumer(), 2) == ["a", "a"]


class UniqueTests(BrokerSuite):
    """The trait `unique`: an id is stored once a day."""

    @pytest.fixture
    def unique_broker(self, broker: Broker) -> Broker:
        needs(broker, "unique")
        return broker

    async def test_a_unique_id_is_stored_once_and_refused_by_name(
        self, rig: Rig, unique_broker: Broker
    ) -> None:
        batch = [envelope(one, unique=True) for one in ("a", "b", "a")]
        assert list(await unique_broker.publish(batch)) == ["a"]
        again = [envelope("b", unique=True), envelope("c", unique=True)]
        assert list(await unique_broker.publish(again)) == ["b"]
        assert await rig.finish(await rig.consumer(), 3) == ["a", "b", "c"]

    async def test_a_unique_id_stays_refused_after_its_message_is_done(
        self, rig: Rig, unique_broker: Broker
    ) -> None:
        await rig.publish("a", unique=True)
        assert await rig.finish(await rig.consumer(), 1) == ["a"]
        assert list(await unique_broker.publish([envelope("a", unique=True)])) == ["a"]

    async def test_a_unique_id_is_stored_again_after_a_day(
        self, rig: Rig, unique_broker: Broker
    ) -> None:
        await rig.publish("a", unique=True)
        await rig.harness.pass_time(86_300.0)
        assert list(await unique_broker.publish([envelope("a", unique=True)])) == ["a"]
        await rig.harness.pass_time(200.0)
        assert not await unique_broker.publish([envelope("a", unique=True)])
        assert await rig.finish(await rig.consumer(), 2) == ["a", "a"]

    async def test_clients_that_publish_a_unique_id_at_once_store_it_once(
        self, rig: Rig, unique_broker: Broker
    ) -> None:
        brokers = [await rig.harness.broker() for _ in range(4)]
        refused = await asyncio.gather(
            *(broker.publish([envelope("a", unique=True)]) for broker in brokers)
        )
        assert sorted(map(len, refused)) == [0, 1, 1, 1]
        assert await rig.finish(await rig.consumer(), 1) == ["a"]

    async def test_a_unique_id_does_not_refuse_its_own_retry(
        self, rig: Rig, unique_broker: Broker
    ) -> None:
        consumer, [got] = await rig.hold("a", unique=True)
        await consumer.settle([Again(got, envelope("a", unique=True))])
        assert await rig.finish(consumer, 1) == ["a"]

    async def test_a_repeated_call_does_not_refuse_its_own_unique_ids(
        self, rig: Rig, unique_broker: Broker
    ) -> None:
        for _ in range(2):
            assert not await unique_broker.publish([envelope("a", unique=True)], call_id="c")
        assert await rig.finish(await rig.consumer(), 1) == ["a"]
