"""Batches cut into chunks that one statement can carry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_MOST_BYTES = 4 * 1024 * 1024
"""A statement and its parameters are in memory as a whole, here and in the server."""


def chunks(batch: Sequence[T], sizes: Sequence[int], *, rows: int) -> Iterator[Sequence[T]]:
    """Cut a batch into chunks, in its order.

    Args:
        batch: Anything.
        sizes: The bytes of each item. An item of any size fits into a chunk of its own.
        rows: The most items in a chunk.
    """
    if len(batch) <= rows and sum(sizes) <= _MOST_BYTES:
        if batch:
            yield batch
        return
    start, total = 0, 0
    for number, size in enumerate(sizes):
        if number > start and (number - start == rows or total + size > _MOST_BYTES):
            yield batch[start:number]
            start, total = number, 0
        total += size
    yield batch[start:]
