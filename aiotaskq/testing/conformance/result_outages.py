"""Conformance tests of result backends while their server is unreachable."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from aiotaskq.contract.results import ReplyBackend, ResultBackend
from aiotaskq.errors import BackendUnavailable
from aiotaskq.testing.conformance.harness import ResultHarness
from aiotaskq.testing.conformance.result_listener import (
    ResultListener,
    listening,
    outcome,
)
from aiotaskq.testing.conformance.rig import MOMENT, PATIENCE, retry_unavailable


class ResultOutageTests:
    """Each call raises `BackendUnavailable`, and subscriptions go on after the outage."""

    @pytest.fixture
    def cuttable(self, harness: ResultHarness) -> ResultHarness:
        if not harness.can_cut:
            pytest.skip(f"{type(harness).__name__}.can_cut is False")
        return harness

    async def test_every_call_raises_backend_unavailable_during_an_outage(
        self, cuttable: ResultHarness
    ) -> None:
        backend = await cuttable.backend()
        clone = backend.clone()
        await cuttable.cut()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: backend.store([outcome("a")], None),
            clone.open,
        ]
        if not isinstance(backend, ReplyBackend):  # its outcomes are in this process
            calls += [lambda: backend.load(["a"]), lambda: backend.forget(["a"])]
        for call in calls:
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(BackendUnavailable):
                    await call()
        await clone.close()
        await backend.close()
        await cuttable.mend()

    async def test_the_same_object_works_after_an_outage(self, cuttable: ResultHarness) -> None:
        backend = await cuttable.backend()
        await backend.store([outcome("before")], None)
        await cuttable.cut()
        with pytest.raises(BackendUnavailable):
            await backend.store([outcome("meanwhile")], None)
        await cuttable.mend()
        await retry_unavailable(lambda: backend.store([outcome("after")], None))
        assert set(await backend.load(["before", "after"])) == {"before", "after"}

    async def test_an_outage_gives_subscribers_an_empty_item_and_ends(
        self, cuttable: ResultHarness
    ) -> None:
        backend = await self._subscribed(cuttable)
        async with listening(backend) as listener:
            await cuttable.cut()
            await asyncio.sleep(MOMENT)
            await cuttable.mend()
            assert await listener.item(1) == []
            await retry_unavailable(lambda: backend.store([outcome("after")], None))
            await listener.wait_for(["after"])

    async def test_a_subscription_that_begins_during_an_outage_waits_for_its_end(
        self, cuttable: ResultHarness
    ) -> None:
        backend = await self._subscribed(cuttable)
        await cuttable.cut()
        listener = ResultListener(backend)
        task = asyncio.create_task(listener.listen())
        await asyncio.sleep(MOMENT)
        assert not listener.items
        assert not task.done()
        await cuttable.mend()
        assert await listener.item(0) == []
        await retry_unavailable(lambda: backend.store([outcome("after")], None))
        await listener.wait_for(["after"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _subscribed(self, cuttable: ResultHarness) -> ResultBackend:
        """Return a backend that pushes outcomes of other clients through its server."""
        backend = await cuttable.backend()
        if isinstance(backend, ReplyBackend):
            pytest.skip(f"{type(backend).__name__} is sent outcomes only by address")
        return backend
