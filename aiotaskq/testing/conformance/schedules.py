"""Conformance tests of schedule stores: swaps, stored envelopes, loading and due times."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

import pytest

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import Depth, StoredSchedule
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.errors import BrokerUnavailable, Unsupported
from aiotaskq.testing.conformance.harness import BrokerHarness
from aiotaskq.testing.conformance.publish import ODD_NAMES
from aiotaskq.testing.conformance.rig import (
    MOMENT,
    PATIENCE,
    BrokerSuite,
    Rig,
    done,
    envelope,
    expect_nothing,
    expect_unavailable,
    ids_of,
    maintain,
    needs,
    retry_unavailable,
)
from aiotaskq.testing.faults import FaultKind, FaultPlan, FaultPoint, FlakyBroker

Value = TypeVar("Value")

HAIR = 0.0005
"""Seconds by which a returned time may differ from the stored one: half a millisecond."""

ODD_TEXTS = [*ODD_NAMES, "line\nbreak", "line%0Abreak", "100%25", "=", "1\n2\n", " "]


class ScheduleTests(BrokerSuite):
    """The trait `schedules`: each due run is sent once."""

    @pytest.fixture
    def schedules(self, broker: Broker) -> ScheduleStore:
        needs(broker, "schedules")
        return broker.schedules()

    async def test_schedules_are_kept_or_refused_as_the_trait_says(self, broker: Broker) -> None:
        if broker.traits.schedules:
            assert await loaded(broker.schedules()) == []
        else:
            with pytest.raises(Unsupported):
                broker.schedules()

    # --- swaps ---

    async def test_a_swap_puts_replaces_and_removes(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        other = (await rig.harness.broker()).schedules()
        first = schedule("s", "1", due_at=1000.0, body=b"first")
        second = schedule("s", "2", body=b"second")
        assert await schedules.compare_and_swap("s", None, first)
        assert await loaded(other) == [first]
        assert await schedules.compare_and_swap("s", "1", second)
        assert await loaded(other) == [second]
        assert await schedules.compare_and_swap("s", "2", None)
        assert await loaded(other) == []

    async def test_a_swap_adds_moves_and_removes_a_due_time(self, schedules: ScheduleStore) -> None:
        for seen, new in (
            (None, schedule("s", "1")),
            ("1", schedule("s", "2", due_at=1000.0)),
            ("2", schedule("s", "3", due_at=2000.0)),
            ("3", schedule("s", "4")),
            ("4", schedule("s", "5", due_at=3000.0)),
        ):
            assert await schedules.compare_and_swap("s", seen, new)
            assert await due(schedules, 10) == ([] if new.due_at is None else [new])
            assert await loaded(schedules) == [new]
        assert await schedules.compare_and_swap("s", "5", None)
        assert await due(schedules, 10) == []

    @pytest.mark.parametrize("seen", [None, "", "0", "11", "1\n", "="])
    async def test_a_wrong_revision_changes_nothing_and_stores_nothing(
        self, rig: Rig, schedules: ScheduleStore, seen: str | None
    ) -> None:
        kept = schedule("s", "1", due_at=1000.0, body=b"1\nkept")
        assert await schedules.compare_and_swap("s", None, kept)
        for new in (schedule("s", "2", due_at=2000.0, body=b"new"), schedule("s", "1"), None):
            assert not await schedules.compare_and_swap(
                "s", seen, new, [envelope("a"), envelope("b")]
            )
        assert await loaded(schedules) == [kept]
        assert await due(schedules, 10) == [kept]
        assert await rig.depth() == Depth()

    async def test_a_missing_schedule_has_no_revision(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        assert await schedules.compare_and_swap("t", None, schedule("t", "1"))
        for seen in ("", "1"):
            assert not await schedules.compare_and_swap(
                "s", seen, schedule("s", "1"), [envelope("a")]
            )
            assert not await schedules.compare_and_swap("s", seen, None, [envelope("a")])
        assert ids_of(await schedules.load()) == ["t"]
        assert await rig.depth() == Depth()

    async def test_removing_a_missing_schedule_stores_the_envelopes(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        assert await schedules.compare_and_swap("s", None, None, [envelope("a")])
        assert await loaded(schedules) == []
        assert await rig.depth() == Depth(ready=1)

    async def test_a_removed_schedule_that_is_put_again_is_another_one(
        self, schedules: ScheduleStore
    ) -> None:
        assert await schedules.compare_and_swap("s", None, schedule("s", "1"))
        assert await schedules.compare_and_swap("s", "1", None)
        assert not await schedules.compare_and_swap("s", "1", None)
        again = schedule("s", "2")
        assert await schedules.compare_and_swap("s", None, again)
        assert not await schedules.compare_and_swap("s", "1", schedule("s", "3"))
        assert not await schedules.compare_and_swap("s", "1", None)
        assert await loaded(schedules) == [again]

    @pytest.mark.parametrize("change", ["put", "replace", "remove"])
    async def test_one_of_many_swaps_of_the_same_revision_succeeds(
        self, rig: Rig, schedules: ScheduleStore, change: str
    ) -> None:
        seen = None if change == "put" else "0"
        if seen is not None:
            assert await schedules.compare_and_swap("s", None, schedule("s", seen, due_at=1000.0))
        clients = [(await rig.harness.broker()).schedules() for _ in range(4)]

        async def compare_and_swap(number: int) -> bool:
            new = schedule("s", f"by {number}", due_at=2000.0 + number)
            batch = [envelope(f"{number}:{run}") for run in range(3)]
            client = clients[number % len(clients)]
            return await client.compare_and_swap(
                "s", seen, None if change == "remove" else new, batch
            )

        won = await asyncio.gather(*map(compare_and_swap, range(20)))
        assert sum(won) == 1
        winner = won.index(True)
        left = [(one.revision, one.due_at) for one in await schedules.load()]
        assert left == ([] if change == "remove" else [(f"by {winner}", 2000.0 + winner)])
        assert await rig.finish(await rig.consumer(), 3) == [f"{winner}:{run}" for run in range(3)]

    @pytest.mark.parametrize("seed", range(3))
    async def test_a_cancelled_swap_takes_effect_in_whole_or_not_at_all(
        self, rig: Rig, schedules: ScheduleStore, seed: int
    ) -> None:
        chance = random.Random(seed)
        count = 40
        assert await schedules.compare_and_swap("s", None, schedule("s", "0"))
        for number in range(1, count + 1):
            seen, new = f"{number - 1}", schedule("s", f"{number}", due_at=float(number))
            batch = [envelope(f"{number} in {queue}", queue=queue) for queue in "pq"]
            call = asyncio.create_task(schedules.compare_and_swap("s", seen, new, batch))
            for _ in range(chance.randrange(20)):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            # A caller that does not know repeats the change, which is made once in all.
            await schedules.compare_and_swap("s", seen, new, batch)
            assert await loaded(schedules) == [new]
        ids = [f"{number} in {queue}" for number in range(1, count + 1) for queue in "pq"]
        assert sorted(await rig.finish(await rig.consumer("p", "q"), len(ids))) == sorted(ids)

    @pytest.mark.parametrize("kind", list(FaultKind))
    async def test_a_swap_that_is_repeated_after_a_fault_takes_effect_once(
        self, rig: Rig, schedules: ScheduleStore, kind: FaultKind
    ) -> None:
        assert await schedules.compare_and_swap("s", None, schedule("s", "1"))
        plan = FaultPlan(FaultPoint("schedules.compare_and_swap", 1), kind)
        flaky = FlakyBroker(await rig.harness.broker(), plan)
        new, batch = schedule("s", "2", due_at=1000.0), [envelope("a"), envelope("b")]
        with pytest.raises(BrokerUnavailable):
            await flaky.schedules().compare_and_swap("s", "1", new, batch)
        again = await flaky.schedules().compare_and_swap("s", "1", new, batch)
        await flaky.close()  # which waits for calls without their callers
        assert again is {FaultKind.NOT_SENT: True, FaultKind.REPLY_LOST: False}.get(kind, again)
        assert await loaded(schedules) == [new]
        assert await rig.finish(await rig.consumer(), 2) == ["a", "b"]

    # --- envelopes stored with a swap ---

    async def test_a_swap_stores_envelopes_as_publish_does(
        self, rig: Rig, broker: Broker, schedules: ScheduleStore
    ) -> None:
        await rig.harness.pass_time(self.delay)  # now the local clock is behind that of the store
        before = await rig.harness.now()
        await broker.cancel(["cancelled"])
        batch = [
            envelope("plain", body=b"payload\n\x00"),
            envelope("cancelled"),
            envelope("first", priority=9 if broker.traits.priorities else 0),
            envelope("past", not_before=before - 60.0, expires_in=3600.0),
            envelope("over", expires_at=before - 1.0),
            envelope("soon", delay=self.delay, expires_in=self.delay / 2),
            envelope("late", not_before=before + self.delay + 3600.0),
            envelope("other", queue="p"),
        ]
        assert await schedules.compare_and_swap("s", None, schedule("s", "1"), batch)
        consumer = await rig.consumer()
        got = await rig.receive(consumer, 4)
        await expect_nothing(consumer)
        head = ["first"] if broker.traits.priorities else []
        middle = [name for name in ("plain", "first", "past", "over") if name not in head]
        assert ids_of(got) == head + middle
        by_id = {one.id: one for one in got}
        assert by_id["plain"].body == b"payload\n\x00"
        assert by_id["first"].priority == (9 if broker.traits.priorities else 0)
        assert [one.id for one in got if one.expired] == ["over"]
        expires_at = by_id["past"].expires_at
        assert expires_at is not None
        assert abs(expires_at - before - 3600.0) < PATIENCE
        assert await rig.depth() == Depth(delayed=2, held=4)
        assert await rig.depth("p") == Depth(ready=1)
        await rig.harness.pass_time(self.delay)
        [soon] = await rig.receive(consumer, 1)
        assert (soon.id, soon.expired) == ("soon", True)
        assert not await consumer.settle([done(one) for one in [*got, soon]])

    async def test_a_thousand_envelopes_of_several_queues_keep_their_order(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        batch = [envelope(f"{n}", queue="odd" if n % 2 else "even") for n in range(1000)]
        assert await schedules.compare_and_swap("s", None, schedule("s", "1"), batch)
        for queue in ("odd", "even"):
            ids = [one.id for one in batch if one.queue == queue]
            assert await rig.finish(await rig.consumer(queue), len(ids)) == ids

    async def test_a_waiting_fetch_is_woken_by_a_swap(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        consumer, idle = await rig.consumer("q", "p"), await rig.consumer("elsewhere")
        for number, queue in enumerate("pqp"):
            waiting = asyncio.create_task(consumer.fetch(10, 2 * PATIENCE))
            await expect_nothing(idle)  # by then the other call really waits
            assert not waiting.done()
            seen = f"{number - 1}" if number else None
            batch = [envelope(f"to {queue}", queue=queue)]
            assert await schedules.compare_and_swap("s", seen, schedule("s", f"{number}"), batch)
            async with asyncio.timeout(PATIENCE):
                assert ids_of(await waiting) == [f"to {queue}"]

    # --- loading ---

    async def test_schedules_are_loaded_in_the_order_of_their_ids(
        self, schedules: ScheduleStore
    ) -> None:
        kept = {name: schedule(name, f"of {name}") for name in ("b", "ä", "a", "B", "10", "9", "")}
        for name, one in kept.items():
            assert await schedules.compare_and_swap(name, None, one)
        assert await loaded(schedules) == [kept[name] for name in sorted(kept)]
        assert await loaded(schedules, None) == await loaded(schedules)
        some = ["b", "unknown", "9", "b", "a"]
        assert await loaded(schedules, some) == [kept["9"], kept["a"], kept["b"]]
        assert await loaded(schedules, {"unknown"}) == []
        assert await loaded(schedules, []) == []

    async def test_hundreds_of_schedules_are_loaded_at_once(self, schedules: ScheduleStore) -> None:
        kept = [schedule(f"{number:04}", "1", due_at=float(number)) for number in range(250)]
        for one in kept[::-1]:
            assert await schedules.compare_and_swap(one.id, None, one)
        assert await loaded(schedules) == kept
        assert await loaded(schedules, [one.id for one in kept[1::2]]) == kept[1::2]
        assert await due(schedules, 1000) == kept
        assert await due(schedules, 220) == kept[:220]

    async def test_any_text_is_an_id_or_a_revision(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        kept: list[StoredSchedule] = []
        for number, text in enumerate(ODD_TEXTS):
            assert await schedules.compare_and_swap(text, None, schedule(text, "before"))
            kept.append(schedule(text, text, due_at=1000.0 + number))
            assert await schedules.compare_and_swap(text, "before", kept[-1], [envelope(text)])
        assert await loaded(schedules) == sorted(kept, key=lambda one: one.id)
        assert await loaded(schedules, ODD_TEXTS[:3]) == sorted(kept[:3], key=lambda one: one.id)
        assert await due(schedules, 100) == kept
        for text in ODD_TEXTS:
            for near in {text.strip(), text.replace("\n", "%0A"), f"{text}\n"} - {text}:
                assert not await schedules.compare_and_swap(text, near, None)
            assert await schedules.compare_and_swap(text, text, None)
        assert await loaded(schedules) == []
        ids = await rig.finish(await rig.consumer(), len(ODD_TEXTS))
        assert ids == ODD_TEXTS

    @pytest.mark.parametrize(
        "body",
        [b"", b"\n", b"1\n2\r\n\x00%0A", bytes(range(256)) * 400],
        ids=["empty", "a line", "lines", "100 kB"],
    )
    async def test_any_bytes_are_the_body_of_a_schedule(
        self, schedules: ScheduleStore, body: bytes
    ) -> None:
        one = schedule("s", "1", due_at=1000.0, body=body)
        assert await schedules.compare_and_swap("s", None, one)
        assert await loaded(schedules, ["s"]) == [one]
        assert await due(schedules, 1) == [one]
        assert await schedules.compare_and_swap("s", "1", schedule("s", "2", body=body + b"\n"))
        assert [kept.body for kept in await schedules.load()] == [body + b"\n"]

    # --- due times ---

    async def test_due_schedules_are_returned_in_order_by_the_stores_clock(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        now = await rig.harness.now()
        times = {"soon": now + self.delay, "past": now - 60.0, "late": now + self.delay + 3600.0}
        for name, due_at in (*times.items(), ("never", None)):
            assert await schedules.compare_and_swap(name, None, schedule(name, "1", due_at=due_at))
        found = await schedules.due(10)
        assert ids_of(found.schedules) == ["past"]
        assert _is(found.next_at, times["soon"])
        assert abs(found.now - await rig.harness.now()) < PATIENCE
        await rig.harness.pass_time(self.delay + MOMENT)
        found = await schedules.due(10)
        assert ids_of(found.schedules) == ["past", "soon"]
        assert _is(found.next_at, times["late"])
        assert found.now >= times["soon"]
        await rig.harness.pass_time(3600.0)
        found = await schedules.due(10)
        assert ids_of(found.schedules) == ["past", "soon", "late"]
        assert found.next_at is None
        assert abs(found.now - await rig.harness.now()) < PATIENCE

    async def test_the_limit_of_due_does_not_change_the_time_of_the_next(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        now = await rig.harness.now()
        for number in range(5):
            name = f"{number}"
            one = schedule(name, "1", due_at=now - 60.0 + number)
            assert await schedules.compare_and_swap(name, None, one)
        for limit in (0, 1, 3, 5, 6):
            found = await schedules.due(limit)
            assert ids_of(found.schedules) == list("01234")[:limit]
            assert found.next_at is None
        coming = now + 3600.0
        for name, due_at in (("coming", coming), ("after", coming + 1.0)):
            assert await schedules.compare_and_swap(name, None, schedule(name, "1", due_at=due_at))
        for limit in (0, 1, 3, 5, 6):
            found = await schedules.due(limit)
            assert ids_of(found.schedules) == list("01234")[:limit]
            assert _is(found.next_at, coming)

    async def test_asking_for_what_is_due_takes_nothing(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        one = schedule("s", "1", due_at=1000.0)
        assert await schedules.compare_and_swap("s", None, one)
        other = (await rig.harness.broker()).schedules()
        for store in (schedules, other, schedules):
            assert await due(store, 1) == [one]
        later = schedule("s", "2", due_at=await rig.harness.now() + 3600.0)
        assert await other.compare_and_swap("s", "1", later)
        assert await due(schedules, 1) == []

    async def test_times_are_kept_to_the_millisecond(
        self, rig: Rig, schedules: ScheduleStore
    ) -> None:
        now = round(await rig.harness.now())
        # The order of their ids is not that of their times.
        times = {f"{9 - number}": now - 60.0 + number / 1000.0 for number in range(10)}
        for name in sorted(times):
            one = schedule(name, "1", due_at=times[name])
            assert await schedules.compare_and_swap(name, None, one)
        coming = now + 3600.123
        assert await schedules.compare_and_swap(
            "coming", None, schedule("coming", "1", due_at=coming)
        )
        found = await schedules.due(100)
        assert ids_of(found.schedules) == list(times)
        assert all(_is(one.due_at, times[one.id]) for one in found.schedules)
        assert _is(found.next_at, coming)
        times["coming"] = coming
        assert all(_is(one.due_at, times[one.id]) for one in await schedules.load())

    async def test_a_schedule_is_due_at_exactly_its_time(self, schedules: ScheduleStore) -> None:
        now = (await schedules.due(1)).now
        assert await schedules.compare_and_swap("s", None, schedule("s", "1", due_at=now))
        assert ids_of((await schedules.due(1)).schedules) == ["s"]

    # --- outages and leaks ---

    async def test_schedules_raise_during_an_outage_and_work_after_it(
        self, rig: Rig, harness: BrokerHarness, schedules: ScheduleStore
    ) -> None:
        if not harness.can_cut:
            pytest.skip(f"{type(harness).__name__}.can_cut is False")
        assert await schedules.compare_and_swap("s", None, schedule("s", "1"))
        new = schedule("s", "2", due_at=1000.0)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "load": schedules.load,
            "load some": lambda: schedules.load(["s"]),
            "due": lambda: schedules.due(1),
            "compare_and_swap": lambda: schedules.compare_and_swap("s", "1", new, [envelope("a")]),
            "remove": lambda: schedules.compare_and_swap("t", "1", None),
        }
        await harness.cut()
        await expect_unavailable(calls)
        await harness.mend()
        await retry_unavailable(calls["compare_and_swap"])
        assert await retry_unavailable(lambda: loaded(schedules)) == [new]
        assert await due(schedules, 1) == [new]
        assert await rig.finish(await rig.consumer(), 1) == ["a"]

    async def test_nothing_is_left_of_removed_schedules(
        self, rig: Rig, broker: Broker, schedules: ScheduleStore
    ) -> None:
        texts = [*ODD_TEXTS, "plain"]
        for text in texts:
            new = schedule(text, "1", due_at=1000.0)
            assert await schedules.compare_and_swap(text, None, new, [envelope(text)])
        consumer = await rig.consumer()
        await rig.finish(consumer, len(texts))
        await consumer.close()
        for text in texts:
            assert await schedules.compare_and_swap(text, "1", None)
        await maintain(broker)
        assert await loaded(schedules) == []
        found = await schedules.due(10)
        assert (list(found.schedules), found.next_at) == ([], None)
        assert await rig.harness.leaks() == []


def schedule(
    name: str, revision: str, *, due_at: float | None = None, body: bytes = b"body"
) -> StoredSchedule:
    """Return a schedule."""
    return StoredSchedule(id=name, body=body, due_at=due_at, revision=revision)


async def loaded(store: ScheduleStore, ids: Collection[str] | None = None) -> list[StoredSchedule]:
    """Return the stored schedules."""
    return list(await store.load(ids))


async def due(store: ScheduleStore, limit: int) -> list[StoredSchedule]:
    """Return the due schedules."""
    return list((await store.due(limit)).schedules)


def _is(found: float | None, expected: float) -> bool:
    return found is not None and abs(found - expected) < HAIR
