"""Batches of any size, cut into parts that one call or one statement may carry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def slices(values: Sequence[Value], most: int) -> Iterator[Sequence[Value]]:
    """Cut values into parts of `most` values, the last one shorter."""
    for start in range(0, len(values), most):
        yield values[start : start + most]


def portions(
    values: Sequence[Value], sizes: Sequence[int], *, most: int, most_bytes: int
) -> Iterator[Sequence[Value]]:
    """Cut values into parts that are limited in their number and in their size.

    A value that is larger than the limit is a part of its own.

    Args:
        values: The values.
        sizes: The size of each value in bytes.
        most: The most values of one part.
        most_bytes: The most bytes of one part.
    """
    if len(values) <= most and sum(sizes) <= most_bytes:  # which is so for nearly every batch
        if values:
            yield values
        return
    start = total = 0
    for place, size in enumerate(sizes):
        if place > start and (place - start == most or total + size > most_bytes):
            yield values[start:place]
            start, total = place, 0
        total += size
    yield values[start:]
