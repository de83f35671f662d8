"""Conformance tests of refusals: an entry that can never be stored stops no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead
from aiotaskq.errors import BatchRefused
from aiotaskq.testing.conformance.rig import BrokerSuite, Rig, done, envelope, ids_of


class RefusalTests(BrokerSuite):
    """`BatchRefused` of `Broker.publish`, `Broker.revive` and `Consumer.settle`.

    Attributes:
        impossible: Fields of envelopes that the broker can never store, one entry for each kind.
            The tests are skipped where there are none.
    """

    impossible: ClassVar[Sequence[Mapping[str, Any]]] = ()

    @pytest.fixture
    def refused(self) -> list[Envelope]:
        if not self.impossible:
            pytest.skip("the broker stores whatever the core sends")
        return [
            envelope(**{"name": f"bad {number}", **_named(fields)})
            for number, fields in enumerate(self.impossible)
        ]

    async def test_an_envelope_that_can_never_be_stored_is_told_and_the_others_are_stored(
        self, rig: Rig, broker: Broker, refused: list[Envelope]
    ) -> None:
        consumer = await rig.consumer()
        for number, bad in enumerate(refused):
            good = [envelope(f"{number} {one}") for one in "abc"]
            with pytest.raises(BatchRefused) as caught:
                await broker.publish([good[0], bad, good[1], good[2]])
            assert set(caught.value.errors) == {1}
            assert not caught.value.answer
            assert ids_of(await rig.receive(consumer, 3)) == ids_of(good)
        assert set(await broker.depth()) == {"q"}

    async def test_each_of_several_refused_envelopes_is_told_with_its_place(
        self, rig: Rig, broker: Broker, refused: list[Envelope]
    ) -> None:
        batch = [one for bad in refused for one in (bad, envelope("good"))]
        with pytest.raises(BatchRefused) as caught:
            await broker.publish(batch)
        assert sorted(caught.value.errors) == list(range(0, len(batch), 2))
        assert (await rig.depth()).ready == len(refused)

    async def test_a_batch_of_refused_envelopes_stores_nothing_and_harms_nothing(
        self, rig: Rig, broker: Broker, refused: list[Envelope]
    ) -> None:
        for bad in refused:
            for _ in range(2):
                with pytest.raises(BatchRefused):
                    await broker.publish([bad])
        assert await broker.depth() == {}
        await broker.maintain()
        await rig.publish("a")
        assert await rig.finish(await rig.consumer(), 1) == ["a"]

    async def test_a_repeated_call_refuses_the_same_and_stores_nothing_twice(
        self, rig: Rig, broker: Broker, refused: list[Envelope]
    ) -> None:
        batch = [envelope("a"), *refused, envelope("b")]
        for _ in range(2):
            with pytest.raises(BatchRefused) as caught:
                await broker.publish(batch, call_id="call 1")
            assert sorted(caught.value.errors) == list(range(1, 1 + len(refused)))
        assert await rig.finish(await rig.consumer(), 2) == ["a", "b"]

    async def test_a_retry_that_can_never_be_stored_leaves_its_delivery_held_and_no_other(
        self, rig: Rig, broker: Broker, refused: list[Envelope]
    ) -> None:
        for bad in refused:
            consumer, [a, b, c] = await rig.hold("a", "b", "c")
            with pytest.raises(BatchRefused) as caught:
                await consumer.settle([done(a), Again(b, bad), done(c)])
            assert set(caught.value.errors) == {1}
            assert not caught.value.answer
            assert (await rig.depth()).held == 1
            assert not await consumer.settle([Dead(b, "it cannot run again")])
            assert await rig.depth() == Depth(dead=1)
            [letter] = await broker.dead("q")
            assert await broker.discard("q", [letter.key]) == 1

    async def test_a_dead_letter_that_can_never_go_back_stays_and_the_others_go(
        self, rig: Rig, broker: Broker, refused: list[Envelope]
    ) -> None:
        consumer, held = await rig.hold("a", "b")
        await consumer.settle([Dead(one, "why") for one in held])
        letters = {one.id: one.key for one in await broker.dead("q")}
        for bad in refused:
            with pytest.raises(BatchRefused) as caught:
                await broker.revive("q", [("no key", envelope("x")), (letters["a"], bad)])
            assert set(caught.value.errors) == {1}
            assert list(caught.value.answer) == ["no key"]
        with pytest.raises(BatchRefused) as caught:
            await broker.revive("q", [(letters["a"], refused[0]), (letters["b"], envelope("b"))])
        assert set(caught.value.errors) == {0}
        assert ids_of(await broker.dead("q")) == ["a"]
        assert await rig.finish(consumer, 1) == ["b"]

    async def test_a_refused_retry_is_told_beside_deliveries_that_are_not_held(
        self, rig: Rig, refused: list[Envelope]
    ) -> None:
        consumer, [a, b] = await rig.hold("a", "b")
        assert not await consumer.settle([done(a)])
        with pytest.raises(BatchRefused) as caught:
            await consumer.settle([done(a), Again(b, refused[0])])
        assert ids_of(caught.value.answer) == ["a"]
        assert not await consumer.settle([done(b)])
        assert await rig.depth() == Depth()


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the id as `envelope` takes it."""
    return {"name" if field == "id" else field: value for field, value in fields.items()}
