"""The conformance suite of `aiotaskq.contract.results.ResultBackend`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import urlsplit

import msgspec
import pytest
from msgspec import Raw

from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.results import ReplyBackend, ResultBackend
from aiotaskq.errors import BackendUnavailable
from aiotaskq.testing.ear import Ear, ResultHarness, close, listening, outcome, value
from aiotaskq.testing.rig import MOMENT, PATIENCE, elsewhere

__all__ = ["ResultConformance", "ResultHarness"]

FINAL = [TaskStatus.SUCCESS, TaskStatus.FAILURE, TaskStatus.REVOKED]
UNFINISHED = [TaskStatus.PENDING, TaskStatus.STARTED, TaskStatus.RETRY]


class StoreTests:
    """What is kept, and for how long.

    Attributes:
        ttl: Seconds that short-lived outcomes live. A harness that cannot move its clock and
            sleeps instead wants less.
    """

    ttl: ClassVar[float] = 60.0

    @pytest.fixture
    async def backend(self, harness: ResultHarness) -> ResultBackend:
        return await harness.backend()

    async def test_opening_and_closing_twice_is_harmless(self, harness: ResultHarness) -> None:
        backend = await harness.backend()
        await backend.open()
        await backend.store([outcome("a")], None)
        await backend.close()
        await backend.close()

    async def test_a_clone_is_closed_and_works_on_the_same_store(
        self, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("a", value=1)], None)
        clone = backend.clone()
        assert type(clone) is type(backend)
        assert clone.url == backend.url
        await clone.close()  # nothing was opened, so nothing is to close
        await clone.open()
        assert value((await clone.load(["a"]))["a"]) == 1
        await clone.close()
        assert "a" in await backend.load(["a"])

    async def test_the_url_shows_no_password(self, backend: ResultBackend) -> None:
        password = urlsplit(backend.url).password
        assert password is None or set(password) <= {"*"}

    async def test_what_was_stored_is_loaded_by_another_client(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        assert not await backend.store([outcome("a", value={"x": [1, None, "ü"]})], self.ttl)
        loaded = await (await harness.backend()).load(["a"])
        assert list(loaded) == ["a"]
        assert value(loaded["a"]) == {"x": [1, None, "ü"]}

    async def test_what_is_not_there_is_absent(self, backend: ResultBackend) -> None:
        await backend.store([outcome("a")], None)
        assert list(await backend.load(["a", "b"])) == ["a"]
        assert not await backend.load(["b"])
        assert not await backend.load([])

    async def test_an_empty_batch_stores_nothing(self, backend: ResultBackend) -> None:
        assert not await backend.store([], None)

    async def test_every_field_comes_back(self, backend: ResultBackend) -> None:
        whole = Outcome(
            task_id="a",
            status=TaskStatus.FAILURE,
            result=Raw(b'{"exc_type":"E","exc_message":["\\"x\\"",1],"exc_module":"m"}'),
            traceback='Traceback:\n  File "x.py"\n\tü\n',
            children=["b", "c d"],
            date_done=datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
            name="pkg.task",
            worker="worker@host",
            queue="odd: {queue}",
            retries=3,
            execution_time=0.25,
            args=Raw(b'[1,"two",[3.5]]'),
            kwargs=Raw(b'{"k":{"n":null}}'),
        )
        await backend.store([whole], self.ttl)
        loaded = (await backend.load(["a"]))["a"]
        raw = {"result", "args", "kwargs"}
        for field in set(Outcome.__struct_fields__) - raw:
            assert getattr(loaded, field) == getattr(whole, field), field
        for field in raw:
            was, now = getattr(whole, field), getattr(loaded, field)
            assert msgspec.json.decode(now) == msgspec.json.decode(was), field

    async def test_fields_that_were_not_given_come_back_empty(self, backend: ResultBackend) -> None:
        bare = outcome("a", value=[])
        await backend.store([bare], None)
        loaded = (await backend.load(["a"]))["a"]
        for field in set(Outcome.__struct_fields__) - {"result"}:
            assert getattr(loaded, field) == getattr(bare, field), field

    @pytest.mark.parametrize(
        "stored",
        [None, False, 0, -1.5, 2**53, "", "a\nb\t'\"\\ü🐇", [], {}, [[{"a": {}}]], "x" * 2**20],
        ids=lambda stored: repr(stored)[:12],
    )
    async def test_every_json_value_comes_back(self, backend: ResultBackend, stored: Any) -> None:
        await backend.store([outcome("a", value=stored)], None)
        got = value((await backend.load(["a"]))["a"])
        assert got == stored
        assert type(got) is type(stored)

    async def test_a_nul_character_stops_nothing(self, backend: ResultBackend) -> None:
        # Some stores have no room for it. The task has ended all the same, and so have those
        # that are stored in the same batch.
        odd = Outcome(
            task_id="odd",
            status=TaskStatus.FAILURE,
            result=Raw(b'{"x\\u0000":"\\u0000"}'),
            traceback="a\x00b",
        )
        assert not await backend.store([outcome("a", value=1), odd, outcome("b", value=2)], None)
        loaded = await backend.load(["a", "odd", "b"])
        assert loaded["odd"].status is TaskStatus.FAILURE
        assert (value(loaded["a"]), value(loaded["b"])) == (1, 2)

    async def test_any_text_is_an_id(self, backend: ResultBackend) -> None:
        ids = ["two words", "grüße-🐇", "a:b", "{x}", "'; --", "%s*?[", "l\ni", "x" * 150]
        async with listening(backend) as ear:
            await backend.store([outcome(name, value=name) for name in ids], None)
            await ear.hear(ids)
        loaded = await backend.load(ids)
        assert {name: value(one) for name, one in loaded.items()} == {name: name for name in ids}

    @pytest.mark.parametrize("first", FINAL)
    @pytest.mark.parametrize("second", [*FINAL, *UNFINISHED])
    async def test_the_first_final_outcome_stays(
        self, backend: ResultBackend, first: TaskStatus, second: TaskStatus
    ) -> None:
        assert not await backend.store([outcome("a", first, 1)], None)
        assert list(await backend.store([outcome("a", second, 2)], None)) == ["a"]
        loaded = (await backend.load(["a"]))["a"]
        assert (loaded.status, value(loaded)) == (first, 1)

    @pytest.mark.parametrize("first", UNFINISHED)
    @pytest.mark.parametrize("second", [*FINAL, *UNFINISHED])
    async def test_one_that_is_not_final_is_replaced(
        self, backend: ResultBackend, first: TaskStatus, second: TaskStatus
    ) -> None:
        assert not await backend.store([outcome("a", first, 1)], None)
        assert not await backend.store([outcome("a", second, 2)], None)
        loaded = (await backend.load(["a"]))["a"]
        assert (loaded.status, value(loaded)) == (second, 2)

    async def test_only_the_late_ones_of_a_batch_are_refused(self, backend: ResultBackend) -> None:
        await backend.store([outcome("a", value=1), outcome("b", TaskStatus.STARTED)], None)
        batch = [outcome(name, value=2) for name in "abc"]
        assert list(await backend.store(batch, None)) == ["a"]
        loaded = await backend.load("abc")
        assert {name: value(one) for name, one in loaded.items()} == {"a": 1, "b": 2, "c": 2}

    async def test_of_several_for_one_id_in_a_batch_the_first_final_stays(
        self, backend: ResultBackend
    ) -> None:
        batch = [
            outcome("a", TaskStatus.STARTED, 1),
            outcome("a", TaskStatus.SUCCESS, 2),
            outcome("a", TaskStatus.FAILURE, 3),
        ]
        assert list(await backend.store(batch, None)) == ["a"]
        assert value((await backend.load(["a"]))["a"]) == 2

    async def test_of_clients_that_store_at_once_one_wins(self, harness: ResultHarness) -> None:
        backends = [await harness.backend() for _ in range(4)]
        refused = await asyncio.gather(
            *(one.store([outcome("a", value=n)], None) for n, one in enumerate(backends))
        )
        assert sorted(map(len, refused)) == [0, 1, 1, 1]
        winner = next(n for n, one in enumerate(refused) if not one)
        assert value((await backends[0].load(["a"]))["a"]) == winner

    async def test_storing_the_same_batch_again_changes_nothing(
        self, backend: ResultBackend
    ) -> None:
        batch = [outcome("a", value=1), outcome("b", TaskStatus.FAILURE, 2)]
        assert not await backend.store(batch, None)
        assert sorted(await backend.store(batch, None)) == ["a", "b"]
        loaded = await backend.load("ab")
        assert {name: value(one) for name, one in loaded.items()} == {"a": 1, "b": 2}

    async def test_a_large_batch_is_stored_and_loaded(self, backend: ResultBackend) -> None:
        batch = [outcome(f"{n}", value=n) for n in range(5000)]
        assert not await backend.store(batch, self.ttl)
        loaded = await backend.load([f"{n}" for n in range(5001)])
        assert {name: value(one) for name, one in loaded.items()} == {
            f"{n}": n for n in range(5000)
        }

    async def test_an_outcome_is_absent_after_its_time(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("short")], self.ttl)
        await backend.store([outcome("long")], 10 * self.ttl)
        await backend.store([outcome("ever")], None)
        await harness.pass_time(self.ttl / 2)
        assert len(await backend.load(["short", "long", "ever"])) == 3
        await harness.pass_time(self.ttl / 2 + 1.0)
        assert set(await backend.load(["short", "long", "ever"])) == {"long", "ever"}
        assert await backend.forget(["short"]) == 0

    async def test_an_outcome_that_is_out_of_date_refuses_nothing(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("a", value=1)], self.ttl)
        await harness.pass_time(self.ttl + 1.0)
        assert not await backend.store([outcome("a", value=2)], self.ttl)
        assert value((await backend.load(["a"]))["a"]) == 2

    async def test_a_replacement_brings_its_own_time(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("a", TaskStatus.STARTED)], self.ttl)
        await backend.store([outcome("a", value=1)], 10 * self.ttl)
        await backend.store([outcome("b", TaskStatus.STARTED)], 10 * self.ttl)
        await backend.store([outcome("b", value=1)], self.ttl)
        await harness.pass_time(self.ttl + 1.0)
        assert set(await backend.load("ab")) == {"a"}

    async def test_forget_deletes_and_counts(self, backend: ResultBackend) -> None:
        await backend.store([outcome(name) for name in "abc"], None)
        assert await backend.forget(["a", "b", "unknown"]) == 2
        assert await backend.forget(["a", "b"]) == 0
        assert await backend.forget([]) == 0
        assert set(await backend.load("abc")) == {"c"}
        assert not await backend.store([outcome("a", value=2)], None)


class ArrivalTests:
    """What a subscriber hears."""

    @pytest.fixture
    async def backend(self, harness: ResultHarness) -> ResultBackend:
        return await harness.backend()

    async def test_nothing_that_is_stored_after_the_first_item_is_missed(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        other = await harness.backend()
        for number in range(5):
            async with listening(backend) as ear:
                await other.store([outcome(f"{number}")], None)  # at once: there is no gap
                await ear.hear([f"{number}"])

    async def test_ids_of_a_large_batch_are_all_heard(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        ids = [f"{n}" for n in range(2000)]
        async with listening(backend) as ear:
            await (await harness.backend()).store([outcome(name) for name in ids], None)
            await ear.hear(ids)

    async def test_many_stores_by_many_clients_are_all_heard(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        others = [await harness.backend() for _ in range(3)]

        async def store(number: int) -> None:
            for n in range(50):
                await others[number].store([outcome(f"{number}.{n}")], None)

        async with listening(backend) as ear:
            await asyncio.gather(*map(store, range(3)))
            await ear.hear([f"{number}.{n}" for number in range(3) for n in range(50)])

    async def test_every_subscriber_hears_everything(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        async with (
            listening(backend) as first,
            listening(backend) as second,
            listening(await harness.backend()) as third,
        ):
            await backend.store([outcome("a"), outcome("b")], None)
            for ear in (first, second, third):
                await ear.hear(["a", "b"])

    async def test_what_is_heard_can_be_loaded(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        other = await harness.backend()
        async with listening(backend) as ear:
            for n in range(20):
                await other.store([outcome(f"{n}", value=n)], None)
                await ear.hear([f"{n}"])
                assert value((await backend.load([f"{n}"]))[f"{n}"]) == n

    async def test_a_subscription_is_closed_between_two_items(self, backend: ResultBackend) -> None:
        iterator = backend.subscribe()
        assert list(await anext(iterator)) == []
        await backend.store([outcome("a")], None)
        await close(iterator)
        with pytest.raises(StopAsyncIteration):
            await anext(iterator)

    async def test_only_final_outcomes_are_heard(self, backend: ResultBackend) -> None:
        async with listening(backend) as ear:
            for status in UNFINISHED:
                await backend.store([outcome(f"not {status}", status)], None)
            await backend.store([outcome("end")], None)
            await ear.hear(["end"])
            assert ear.heard() <= {"end"}  # or told to look

    async def test_what_was_refused_is_not_heard(self, backend: ResultBackend) -> None:
        await backend.store([outcome("old")], None)
        async with listening(backend) as ear:
            await backend.store([outcome("old"), outcome("new")], None)
            await ear.hear(["new"])
            assert ear.heard() <= {"new"}

    async def test_a_closed_subscription_leaves_no_task_behind(
        self, backend: ResultBackend
    ) -> None:
        async with listening(backend):
            pass  # what a driver keeps for all subscribers together may stay until it is closed
        before = asyncio.all_tasks()
        for _ in range(3):
            async with listening(backend) as ear:
                await backend.store([outcome("a")], None)
                await asyncio.sleep(0)
                assert ear.items
        await asyncio.sleep(MOMENT)
        assert len(asyncio.all_tasks()) <= len(before)

    async def test_closing_the_backend_leaves_no_task_behind(self, harness: ResultHarness) -> None:
        before = asyncio.all_tasks()
        backend = await harness.backend()
        async with listening(backend):
            await backend.store([outcome("a")], None)
        await backend.close()
        await asyncio.sleep(MOMENT)
        assert asyncio.all_tasks() <= before

    async def test_the_store_is_heard_on_another_event_loop(self, backend: ResultBackend) -> None:
        clone = backend.clone()

        async def store() -> None:
            await clone.open()
            await clone.store([outcome("a")], None)
            await clone.close()

        async with listening(backend) as ear:
            await elsewhere(store())
            await ear.hear(["a"])


class BackendOutageTests:
    """Every call says `BackendUnavailable`, and subscribers wait the outage out."""

    @pytest.fixture
    def cuttable(self, harness: ResultHarness) -> ResultHarness:
        if not harness.can_cut:
            pytest.skip(f"{type(harness).__name__}.can_cut is False")
        return harness

    async def test_every_call_tells_that_the_backend_is_away(self, cuttable: ResultHarness) -> None:
        backend = await cuttable.backend()
        clone = backend.clone()
        await cuttable.cut()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: backend.store([outcome("a")], None),
            clone.open,
        ]
        if not isinstance(backend, ReplyBackend):  # which has at hand what it was sent
            calls += [lambda: backend.load(["a"]), lambda: backend.forget(["a"])]
        for call in calls:
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(BackendUnavailable):
                    await call()
        await clone.close()
        await backend.close()
        await cuttable.mend()

    async def test_the_same_object_works_when_it_is_back(self, cuttable: ResultHarness) -> None:
        backend = await cuttable.backend()
        await backend.store([outcome("before")], None)
        await cuttable.cut()
        with pytest.raises(BackendUnavailable):
            await backend.store([outcome("meanwhile")], None)
        await cuttable.mend()
        await self._store(backend, "after")
        assert set(await backend.load(["before", "after"])) == {"before", "after"}

    async def test_a_subscriber_is_told_of_the_gap_and_hears_again(
        self, cuttable: ResultHarness
    ) -> None:
        backend = await self._subscribed(cuttable)
        async with listening(backend) as ear:
            await cuttable.cut()
            await asyncio.sleep(MOMENT)
            await cuttable.mend()
            assert await ear.item(1) == []
            await self._store(backend, "after")
            await ear.hear(["after"])

    async def test_a_subscription_that_begins_meanwhile_waits_it_out(
        self, cuttable: ResultHarness
    ) -> None:
        backend = await self._subscribed(cuttable)
        await cuttable.cut()
        ear = Ear(backend)
        task = asyncio.create_task(ear.listen())
        await asyncio.sleep(MOMENT)
        assert not ear.items
        assert not task.done()
        await cuttable.mend()
        assert await ear.item(0) == []
        await self._store(backend, "after")
        await ear.hear(["after"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _subscribed(self, cuttable: ResultHarness) -> ResultBackend:
        """Return a backend whose subscribers hear of others over the network."""
        backend = await cuttable.backend()
        if isinstance(backend, ReplyBackend):
            pytest.skip(f"{type(backend).__name__} is sent outcomes only by address")
        return backend

    async def _store(self, backend: ResultBackend, task_id: str) -> None:
        """Store once the driver has found its way back, as its users do."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await backend.store([outcome(task_id)], None)
                except BackendUnavailable:
                    await asyncio.sleep(MOMENT)
                else:
                    return


class ResultConformance(StoreTests, ArrivalTests, BackendOutageTests):
    """Everything that a result backend must do. Derive from it and give the fixture `harness`.

    The class attribute `ttl` is in seconds; lower it where the harness's `pass_time` really
    sleeps.
    """
