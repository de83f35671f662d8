"""Helpers of the tests of the Redis driver."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from msgspec import Raw

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.errors import Unavailable

PATIENCE = 120.0
Value = TypeVar("Value")


def envelope(name: str, **fields: object) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": name.encode(errors="replace"), **fields})  # type: ignore[arg-type]  # a test's shorthand


def outcome(name: str, status: TaskStatus = TaskStatus.SUCCESS) -> Outcome:
    return Outcome(task_id=name, status=status, result=Raw(b"[1]"))


async def insist(call: Callable[..., Awaitable[Value]], *args: Any, **named: Any) -> Value:
    """Repeat a call while the server is away, as a worker does."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call(*args, **named)
            except Unavailable:
                await asyncio.sleep(0.01)
