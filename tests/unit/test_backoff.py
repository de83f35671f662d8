"""`Backoff`: the pauses between attempts."""

from __future__ import annotations

import pytest

from aiotaskq.backoff import Backoff, doubled, jittered


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_success() -> None:
    backoff = Backoff(0.1, 1.0, jitter=False)
    assert [backoff.next() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert backoff.failures == 6
    backoff.reset()
    assert backoff.failures == 0
    assert backoff.next() == 0.1


def test_jitter_takes_up_to_half_of_a_pause_away() -> None:
    assert jittered(4.0, chance=lambda: 0.0) == 2.0
    assert jittered(4.0, chance=lambda: 1.0) == 4.0
    backoff = Backoff(1.0, 60.0, chance=lambda: 0.5)
    assert [backoff.next() for _ in range(3)] == [0.75, 1.5, 3.0]


def test_any_number_of_failures_leads_to_a_number() -> None:
    assert doubled(1.0, 5000) == 2.0**60
    backoff = Backoff(0.05, 5.0, jitter=False)
    backoff.failures = 100_000
    assert backoff.next() == 5.0
