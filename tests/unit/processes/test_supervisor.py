"""Decisions of the supervisor; `tests/integrations` has its tests with real processes."""

from __future__ import annotations

from aiotaskq.processes.supervisor import _RestartPauses


def test_the_first_replacement_is_quick_and_pauses_grow_to_half_a_minute() -> None:
    pauses = _RestartPauses()
    assert [pauses.next(lived=1.0) for _ in range(9)] == [0.1, 0.5, 1, 2, 4, 8, 16, 30, 30]


def test_a_steady_life_makes_the_next_replacement_quick_again() -> None:
    pauses = _RestartPauses()
    assert [pauses.next(lived) for lived in (1.0, 1.0, 1.0)] == [0.1, 0.5, 1.0]
    assert pauses.next(lived=10.1) == 0.1
    assert pauses.next(lived=1.0) == 0.5
