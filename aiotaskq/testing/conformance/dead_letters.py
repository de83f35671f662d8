"""Conformance tests of dead letters: reading, reviving, discarding and trimming them."""

from __future__ import annotations

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import SUSPECT
from aiotaskq.contract.records import DeadLimits, Depth
from aiotaskq.contract.settlement import Dead, Done
from aiotaskq.errors import ConfigError
from aiotaskq.testing.conformance.rig import (
    MOMENT,
    PATIENCE,
    BrokerSuite,
    Rig,
    envelope,
    expect_nothing,
    ids_of,
    maintain,
    needs,
)

NO_KEYS = [
    "nonsense",
    "",
    "nan",
    "-1",
    "1e999",
    "0x10",
    " ",
    "1\n",
    "\x00",
    "\uff11",
    "7" * 100_000,
]
"""Texts that no broker gives as the key of a dead letter."""


class DeadLetterTests(BrokerSuite):
    """`Broker.dead`, `revive` and `discard`, and the limits of `maintain`."""

    async def test_dead_keeps_payload_reason_and_details(self, rig: Rig, broker: Broker) -> None:
        every, reason = bytes(range(256)), "no such task: ü\n'x'"
        consumer, [got] = await rig.hold("a", body=every)
        before = await rig.harness.now()
        assert not await consumer.settle([Dead(got, reason, every[::-1])])
        [letter] = await broker.dead("q")
        assert (letter.id, letter.queue, letter.body) == ("a", "q", every)
        assert (letter.reason, letter.details, letter.crashes) == (reason, every[::-1], 0)
        assert abs(letter.died_at - before) < PATIENCE
        await expect_nothing(consumer)
        assert await rig.depth() == Depth(dead=1)

    async def test_dead_keeps_the_count_of_crashes(self, rig: Rig, broker: Broker) -> None:
        await rig.crash("a", times=SUSPECT)
        await self._bury(rig, 1)
        [letter] = await broker.dead("q")
        assert (letter.crashes, letter.details) == (SUSPECT, b"")

    async def test_dead_letters_are_read_in_pages_newest_first(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, *"abcde", "a")  # one id may have several letters
        letters = await broker.dead("q")
        assert ids_of(letters) == ["a", *"edcba"]
        assert [one.reason for one in letters[:2]] == ["because of a", "because of e"]
        assert len({one.key for one in letters}) == 6
        first = await broker.dead("q", 2)
        assert ids_of(first) == ["a", "e"]
        assert await broker.discard("q", [first[-1].key]) == 1
        second = await broker.dead("q", limit=3, before=first[-1].key)
        assert ids_of(second) == ["d", "c", "b"]
        assert ids_of(await broker.dead("q", 3, before=second[-1].key)) == ["a"]
        assert not await broker.dead("q", before=letters[-1].key)
        assert not await broker.dead("p")

    async def test_reading_before_a_text_that_is_no_key_is_refused(
        self, rig: Rig, broker: Broker
    ) -> None:
        async def answer(queue: str, text: str) -> str:
            try:
                return f"{queue}, {text[:10]!r}: {await broker.dead(queue, 1, before=text)}"
            except ConfigError:
                return "refused"

        answers = {await answer("q", text) for text in NO_KEYS}
        await self._kill(rig, *"ab")
        answers |= {await answer(queue, text) for text in NO_KEYS for queue in ("q", "p")}
        assert answers == {"refused"}
        assert ids_of(await broker.dead("q")) == ["b", "a"]

    async def test_a_text_that_is_no_key_is_missing_for_revive_and_discard(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, *"ab")
        gone = await broker.revive("q", [(text, envelope("a")) for text in NO_KEYS])
        assert sorted(gone) == sorted(NO_KEYS)
        assert await broker.discard("q", NO_KEYS) == 0
        assert await rig.depth() == Depth(dead=2)

    async def test_the_key_of_a_letter_that_is_gone_may_be_read_before(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, *"abcde")
        e, d, c, b, a = [one.key for one in await broker.dead("q")]
        assert await broker.discard("q", [d]) == 1
        assert not await broker.revive("q", [(b, envelope("b"))])
        assert ids_of(await broker.dead("q", before=d)) == ["c", "a"]
        assert ids_of(await broker.dead("q", before=b)) == ["a"]
        assert await broker.discard("q", [a, c, e]) == 3
        for key in (a, b, c, d, e):
            assert not await broker.dead("q", before=key)

    async def test_the_key_of_a_dead_letter_stays_the_same(self, rig: Rig, broker: Broker) -> None:
        await self._kill(rig, *"abc")
        before = {one.id: one.key for one in await broker.dead("q")}
        await broker.discard("q", [before["b"]])
        await self._kill(rig, "d")
        after = {one.id: one.key for one in await (await rig.harness.broker()).dead("q")}
        assert (after["a"], after["c"]) == (before["a"], before["c"])
        assert after["d"] not in before.values()

    async def test_revive_stores_in_place_and_in_order(self, rig: Rig, broker: Broker) -> None:
        await self._kill(rig, *"abcd")
        await rig.publish("x")
        a, b, c, _ = (await broker.dead("q"))[::-1]
        letters = [
            (c.key, envelope("c", body=b"mended")),
            (a.key, envelope("a", delay=self.delay)),
            (b.key, envelope("b")),
        ]
        assert not await broker.revive("q", letters)
        assert await rig.depth() == rig.countable(Depth(ready=3, delayed=1, dead=1))
        assert ids_of(await broker.dead("q")) == ["d"]
        consumer = await rig.consumer()
        got = await rig.receive(consumer, 3)
        assert [(one.id, one.body) for one in got] == [
            ("x", b"body of x"),
            ("c", b"mended"),
            ("b", b"body of b"),
        ]
        assert not await consumer.settle([Done(one) for one in got])
        # The second call changes nothing, and returns all keys.
        assert set(await broker.revive("q", letters)) == {a.key, b.key, c.key}
        await rig.harness.pass_time(self.delay)
        assert await rig.finish(consumer, 1) == ["a"]

    async def test_missing_keys_are_returned_and_nothing_is_stored_for_them(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, *"ab")
        newer, older = await broker.dead("q")
        assert await broker.discard("q", [older.key]) == 1
        twice = [(newer.key, envelope("b")), (newer.key, envelope("b"))]
        gone = await broker.revive("q", [(older.key, envelope("a")), *twice])
        assert sorted(gone) == sorted([older.key, newer.key])
        assert list(await broker.revive("p", [(newer.key, envelope("b", queue="p"))])) == [
            newer.key
        ]
        assert list(await broker.revive("q", [("no key", envelope("a"))])) == ["no key"]
        assert not await broker.revive("q", [])
        assert await rig.depth() == Depth(ready=1)
        assert await rig.finish(await rig.consumer(), 1) == ["b"]

    async def test_a_revived_message_wakes_a_waiting_fetch_and_counts_as_new(
        self, rig: Rig, broker: Broker
    ) -> None:
        await rig.crash("a", unique=broker.traits.unique)
        await self._bury(rig, 1)
        await broker.cancel(["a"])
        [letter] = await broker.dead("q")
        assert letter.crashes == SUSPECT
        waiting, _ = await rig.hold("held")  # so that it would get no suspect
        one = envelope("a", unique=broker.traits.unique)
        assert not await broker.revive("q", [(letter.key, one)])
        [got] = await rig.receive(waiting, 1)
        assert (got.id, got.crashes, got.crash_note) == ("a", 0, "")
        assert "a" not in (await waiting.news()).cancelled

    @pytest.mark.parametrize("again", [True, False])
    async def test_a_unique_id_is_refused_after_its_letter_was_revived(
        self, rig: Rig, broker: Broker, again: bool
    ) -> None:
        needs(broker, "unique")
        await rig.publish("a", unique=True)
        await self._bury(rig, 1)
        [letter] = await broker.dead("q")
        assert not await broker.revive("q", [(letter.key, envelope("a", unique=again))])
        assert list(await broker.publish([envelope("a", unique=True)])) == ["a"]
        assert await rig.finish(await rig.consumer(), 1) == ["a"]

    async def test_revive_may_change_the_queue_and_the_id(self, rig: Rig, broker: Broker) -> None:
        await self._kill(rig, *"ab")
        b, a = await broker.dead("q")
        letters = [(a.key, envelope("c", queue="p")), (b.key, envelope("b"))]
        assert not await broker.revive("q", letters)
        assert await broker.depth() == {"p": Depth(ready=1), "q": Depth(ready=1)}
        assert await rig.finish(await rig.consumer("p"), 1) == ["c"]
        assert await rig.finish(await rig.consumer(), 1) == ["b"]

    async def test_discard_drops_dead_letters_and_counts_them(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, *"abc")
        c, b, _ = await broker.dead("q")
        assert await broker.discard("p", [b.key]) == 0
        assert await broker.discard("q", []) == 0
        assert await broker.discard("q", {c.key, b.key, "no key", ""}) == 2
        assert await broker.discard("q", [b.key]) == 0
        assert ids_of(await broker.dead("q")) == ["a"]
        assert await rig.depth() == Depth(dead=1)

    async def test_discard_counts_a_key_that_is_given_twice_once(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, *"ab")
        b, _ = await broker.dead("q")
        assert await broker.discard("q", [b.key, b.key]) == 1
        assert ids_of(await broker.dead("q")) == ["a"]

    async def test_the_oldest_dead_letters_above_the_limit_are_trimmed(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, *"abcde")
        await self._kill(rig, "other", queue="p")
        assert await maintain(broker, DeadLimits(most=5)) == await maintain(broker)
        assert (await maintain(broker, DeadLimits(most=2))).trimmed == 3
        assert ids_of(await broker.dead("q")) == ["e", "d"]
        assert ids_of(await broker.dead("p")) == ["other"]
        assert (await maintain(broker, DeadLimits(most=0))).trimmed == 3
        assert await broker.depth() == {}

    async def test_dead_letters_above_the_age_limit_are_trimmed(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, "old", "older")
        assert (await maintain(broker, DeadLimits(age=self.delay))).trimmed == 0
        await rig.harness.pass_time(self.delay + MOMENT)
        await self._kill(rig, "new")
        assert (await maintain(broker, DeadLimits(age=None))).trimmed == 0
        assert (await maintain(broker, DeadLimits(age=self.delay))).trimmed == 2
        assert ids_of(await broker.dead("q")) == ["new"]

    async def test_thousands_of_dead_letters_are_trimmed_in_several_rounds(
        self, rig: Rig, broker: Broker
    ) -> None:
        await self._kill(rig, *(f"{n}" for n in range(2500)))
        # `maintain` of the rig checks that each round does a bounded amount.
        assert (await maintain(broker, DeadLimits(most=10))).trimmed == 2490
        assert ids_of(await broker.dead("q")) == [f"{n}" for n in range(2499, 2489, -1)]

    async def _kill(self, rig: Rig, *ids: str, queue: str = "q") -> None:
        await rig.publish(*ids, queue=queue)
        await self._bury(rig, len(ids), queue)

    async def _bury(self, rig: Rig, count: int, queue: str = "q") -> None:
        """Settle waiting messages as dead, in order."""
        consumer = await rig.consumer(queue)
        got = await rig.receive(consumer, count)
        assert not await consumer.settle([Dead(one, f"because of {one.id}") for one in got])
        await consumer.close()
