"""Batches cut into chunks."""

from __future__ import annotations

import pytest

from aiotaskq.drivers.postgres.chunks import chunks

MEGABYTE = 1024 * 1024


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([1], [[0]]),
        ([1, 1, 1], [[0, 1, 2]]),
        ([1] * 7, [[0, 1, 2], [3, 4, 5], [6]]),
        ([9 * MEGABYTE], [[0]]),
        ([9 * MEGABYTE, 1, 9 * MEGABYTE, 1, 1], [[0], [1], [2], [3, 4]]),
        ([2 * MEGABYTE, 2 * MEGABYTE, 1], [[0, 1], [2]]),
    ],
)
def test_a_chunk_has_a_bounded_number_of_rows_and_bytes(
    sizes: list[int], expected: list[list[int]]
) -> None:
    assert list(chunks(list(range(len(sizes))), sizes, rows=3)) == expected
