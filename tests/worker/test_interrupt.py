"""`interruptible`: another exception in place of a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from aiotaskq.worker.interrupt import interruptible
from tests.worker.events import LONG, until


class _Interruption:
    """Drives a coroutine, and raises an error in it where it waits, once."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], error: BaseException | None) -> None:
        self.error = error
        self.task = asyncio.ensure_future(self._drive(coroutine))

    async def _drive(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await interruptible(coroutine, lambda: self.error)


async def test_an_interruptible_coroutine_is_otherwise_as_any_other() -> None:
    async def job(step: asyncio.Future[int]) -> int:
        await asyncio.sleep(0)
        async with asyncio.timeout(LONG):
            return await step + 1

    step: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    driven = _Interruption(job(step), None)
    await until(lambda: not driven.task.done())
    step.set_result(1)
    assert await driven.task == 2

    failing: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    failing.set_exception(LookupError("from the future"))
    with pytest.raises(LookupError, match="from the future"):
        await _Interruption(job(failing), None).task


async def test_without_a_replacement_a_cancellation_stays_one() -> None:
    async def job() -> None:
        await asyncio.sleep(LONG)

    driven = _Interruption(job(), None)
    await asyncio.sleep(0)
    driven.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await driven.task
