"""Concurrent calls to several shards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, TypeVar

from aiotaskq.errors import BatchRefused

Value = TypeVar("Value")


async def gather_batches(
    shares: Sequence[Sequence[Any]], calls: Iterable[Awaitable[Any]], batch: Sequence[Any]
) -> tuple[list[Any], dict[int, Exception]]:
    """Run the calls for the shares of a batch, as `gather_all` does.

    Args:
        shares: The entries of each call.
        calls: The calls, in the same order.
        batch: All entries.

    Returns:
        The values of the calls, and the entries that were refused, by their positions in the batch.
    """
    refused: dict[int, Exception] = {}  # by identity

    async def attempt(share: Sequence[Any], call: Awaitable[Any]) -> Any:
        try:
            return await call
        except BatchRefused as error:
            refused.update((id(share[place]), why) for place, why in error.errors.items())
            return error.answer

    values = await gather_all(map(attempt, shares, calls))
    errors = {place: refused[id(one)] for place, one in enumerate(batch) if id(one) in refused}
    return values, errors


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
