"""Concurrent calls to several shards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

Value = TypeVar("Value")


async def gather_all(calls: Iterable[Awaitable[Value]]) -> list[Value]:
    """Run calls concurrently, each to its end; return their values, or raise the first error.

    Unlike `asyncio.gather` alone it leaves no call running when another one fails.
    """
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    values: list[Value] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        values.append(outcome)
    return values
