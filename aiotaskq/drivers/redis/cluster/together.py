"""Calls to several shards at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

Value = TypeVar("Value")


async def together(calls: Iterable[Awaitable[Value]]) -> list[Value]:
    """Run calls at once, each to its end; return their values, or raise what the first raised."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    values: list[Value] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        values.append(outcome)
    return values
