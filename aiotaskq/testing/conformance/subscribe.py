"""Conformance tests of `ResultBackend.subscribe`."""

from __future__ import annotations

import asyncio

import pytest

from aiotaskq.contract.results import ResultBackend
from aiotaskq.testing.conformance.harness import ResultHarness
from aiotaskq.testing.conformance.result_listener import (
    close,
    listening,
    outcome,
    value,
)
from aiotaskq.testing.conformance.result_store import UNFINISHED
from aiotaskq.testing.conformance.rig import MOMENT, on_another_loop


class SubscribeTests:
    """`ResultBackend.subscribe`: the items that a subscriber gets."""

    @pytest.fixture
    async def backend(self, harness: ResultHarness) -> ResultBackend:
        return await harness.backend()

    async def test_no_outcome_stored_after_the_first_item_is_missed(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        other = await harness.backend()
        for number in range(5):
            async with listening(backend) as listener:
                await other.store([outcome(f"{number}")], None)  # at once: there is no gap
                await listener.wait_for([f"{number}"])

    async def test_all_outcomes_of_a_large_batch_are_pushed(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        ids = [f"{n}" for n in range(2000)]
        async with listening(backend) as listener:
            await (await harness.backend()).store([outcome(name) for name in ids], None)
            await listener.wait_for(ids)

    async def test_all_outcomes_of_many_clients_are_pushed(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        others = [await harness.backend() for _ in range(3)]

        async def store(number: int) -> None:
            for n in range(50):
                await others[number].store([outcome(f"{number}.{n}")], None)

        async with listening(backend) as listener:
            await asyncio.gather(*map(store, range(3)))
            await listener.wait_for([f"{number}.{n}" for number in range(3) for n in range(50)])

    async def test_every_subscriber_gets_every_outcome(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        async with (
            listening(backend) as first,
            listening(backend) as second,
            listening(await harness.backend()) as third,
        ):
            await backend.store([outcome("a"), outcome("b")], None)
            for listener in (first, second, third):
                await listener.wait_for(["a", "b"])

    async def test_a_pushed_outcome_can_be_loaded(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        other = await harness.backend()
        async with listening(backend) as listener:
            for n in range(20):
                await other.store([outcome(f"{n}", value=n)], None)
                await listener.wait_for([f"{n}"])
                assert value((await backend.load([f"{n}"]))[f"{n}"]) == n

    async def test_a_subscription_can_be_closed_between_two_items(
        self, backend: ResultBackend
    ) -> None:
        iterator = backend.subscribe()
        assert list(await anext(iterator)) == []
        await backend.store([outcome("a")], None)
        await close(iterator)
        with pytest.raises(StopAsyncIteration):
            await anext(iterator)

    async def test_only_final_outcomes_are_pushed(self, backend: ResultBackend) -> None:
        async with listening(backend) as listener:
            for status in UNFINISHED:
                await backend.store([outcome(f"not {status}", status)], None)
            await backend.store([outcome("end")], None)
            await listener.wait_for(["end"])
            assert listener.received() <= {"end"}  # an empty item may have come

    async def test_refused_outcomes_are_not_pushed(self, backend: ResultBackend) -> None:
        await backend.store([outcome("old")], None)
        async with listening(backend) as listener:
            await backend.store([outcome("old"), outcome("new")], None)
            await listener.wait_for(["new"])
            assert listener.received() <= {"new"}

    async def test_a_closed_subscription_leaves_no_task_behind(
        self, backend: ResultBackend
    ) -> None:
        async with listening(backend):
            pass  # tasks that all subscriptions share may stay until the driver is closed
        before = asyncio.all_tasks()
        for _ in range(3):
            async with listening(backend) as listener:
                await backend.store([outcome("a")], None)
                await asyncio.sleep(0)
                assert listener.items
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

    async def test_outcomes_stored_on_another_event_loop_are_pushed(
        self, backend: ResultBackend
    ) -> None:
        clone = backend.clone()

        async def store() -> None:
            await clone.open()
            await clone.store([outcome("a")], None)
            await clone.close()

        async with listening(backend) as listener:
            await on_another_loop(store())
            await listener.wait_for(["a"])
