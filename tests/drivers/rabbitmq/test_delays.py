"""Delays, cut into the queues that a message passes."""

from __future__ import annotations

import pytest

from aiotaskq.drivers.rabbitmq.delays import LONGEST_DELAY, POSITIONS, hops


@pytest.mark.parametrize("seconds", [0.001, 0.015, 0.112, 1.0, 4095.999, 86_400.0, 34_000_000.0])
def test_a_delay_is_as_long_as_its_hops(seconds: float) -> None:
    path = hops(seconds)
    late = sum(hop.milliseconds for hop in path) - seconds * 1000
    assert 0 <= late <= len(path) + 2
    assert [hop.position for hop in path] == sorted({hop.position for hop in path}, reverse=True)
    assert path[-1].position == 0
    assert all(0 < hop.milliseconds < 2**32 for hop in path)


def test_without_a_delay_there_are_no_hops() -> None:
    assert hops(0.0) == hops(-1.0) == []


def test_a_delay_of_years_begins_with_the_longest_way() -> None:
    assert hops(1e12) == hops(LONGEST_DELAY)
    assert len(hops(1e12)) <= POSITIONS
