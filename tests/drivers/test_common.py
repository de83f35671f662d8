"""Helpers that several drivers share: batches, deliveries, timing, rows, dead letters."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import UNSET

from aiotaskq.contract.message import SUSPECT, Attempt, Delivery
from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.contract.records import Depth
from aiotaskq.drivers.common.batches import portions, slices
from aiotaskq.drivers.common.clock import SweepTimer, is_stall
from aiotaskq.drivers.common.dead_letter_counts import DeadLetterCount
from aiotaskq.drivers.common.deliveries import hand_out, next_is_suspect
from aiotaskq.drivers.common.rows import count_depths, read_outcome, write_history
from aiotaskq.errors import DecodeError

MEGABYTE = 1024 * 1024


@pytest.mark.parametrize(
    ("values", "parts"),
    [("", []), ("a", ["a"]), ("abc", ["abc"]), ("abcd", ["abc", "d"]), ("abcdef", ["abc", "def"])],
)
def test_slices_have_a_limited_length(values: str, parts: list[str]) -> None:
    assert list(slices(values, 3)) == parts


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([], []),
        ([1, 1, 1], [[1, 1, 1]]),
        ([1, 1, 1, 1], [[1, 1, 1], [1]]),
        ([6, 4, 1], [[6, 4], [1]]),
        ([6, 5, 5], [[6], [5, 5]]),
        ([99], [[99]]),
        ([1, 99, 1], [[1], [99], [1]]),
    ],
)
def test_portions_are_limited_in_number_and_size(sizes: list[int], parts: list[list[int]]) -> None:
    assert list(portions(sizes, sizes, most=3, most_bytes=10)) == parts


@pytest.mark.parametrize(
    ("sizes", "parts"),
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
def test_portions_keep_the_order_of_the_values(sizes: list[int], parts: list[list[int]]) -> None:
    values = list(range(len(sizes)))
    assert list(portions(values, sizes, most=3, most_bytes=4 * MEGABYTE)) == parts


@pytest.mark.parametrize(
    ("crashes", "limit", "count"),
    [
        ([], 3, 0),
        ([0, 1], 3, 2),
        ([0, 1, 0, 0], 3, 3),
        ([SUSPECT], 3, 1),
        ([SUSPECT, 0, 0], 3, 1),
    ],
)
def test_deliveries_are_handed_out_in_order_and_a_suspect_alone(
    crashes: list[int], limit: int, count: int
) -> None:
    deliveries = [Delivery(f"{n}", "q", b"", n, number) for n, number in enumerate(crashes)]
    received = deque(deliveries)
    assert next_is_suspect(received) is (crashes[:1] == [SUSPECT])
    assert hand_out(received, limit) == deliveries[:count]
    assert list(received) == deliveries[count:]


def test_a_silence_of_more_than_half_a_lease_is_a_stall() -> None:
    assert is_stall(31.0, 60.0)
    assert not is_stall(29.0, 60.0)


def test_a_sweep_is_due_at_first_then_from_time_to_time_and_at_once_if_there_is_more() -> None:
    timer = SweepTimer(10.0)
    assert timer.is_due(0.0)
    timer.note(100.0, more=False)
    assert not timer.is_due(109.0)
    assert timer.is_due(110.0)
    timer.note(110.0, more=True)
    assert timer.is_due(110.0)


def test_dead_letters_are_counted_once_until_there_is_a_new_one_or_another_limit() -> None:
    count = DeadLetterCount()
    assert not count.is_due(None, 10)
    assert count.is_due(7, 10)
    count.note(7, 10)
    assert not count.is_due(7, 10)
    assert count.is_due(8, 10)
    assert count.is_due(7, 5)


def row(**fields: Any) -> tuple[Any, ...]:
    plain = {
        "task_id": "a",
        "status": "SUCCESS",
        "result": "1",
        "date_done": None,
        "traceback": None,
        "name": None,
        "args": None,
        "kwargs": None,
        "worker": None,
        "retries": None,
        "queue": None,
        "execution_time": None,
        "children": None,
        "history": None,
    }
    return tuple((plain | fields).values())


def test_a_row_with_the_least_is_an_outcome() -> None:
    outcome = read_outcome(row(result=None))
    assert (outcome.task_id, outcome.status) == ("a", TaskStatus.SUCCESS)
    assert (bytes(outcome.result), outcome.args, outcome.kwargs) == (b"null", UNSET, UNSET)
    assert (outcome.retries, outcome.children, outcome.history) == (0, [], ())


def test_a_row_with_everything_is_an_outcome() -> None:
    done = datetime(2026, 1, 2, tzinfo=UTC)
    history = (Attempt(number=1, at=1.5, worker="w", error="ValueError: \udc80"),)
    fields = {"result": b"\x01", "args": "[2]", "kwargs": "{}", "children": '["b"]', "retries": 1}
    for date_done in (done, done.isoformat()):
        text = write_history(history)
        outcome = read_outcome(row(**fields, date_done=date_done, history=text))
        assert outcome.date_done == done
        assert (outcome.retries, outcome.children, outcome.history) == (1, ["b"], history)
        assert bytes(outcome.result) == b"\x01"
    assert write_history(()) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "LOST"},
        {"children": "{"},
        {"history": "[1]"},
        {"date_done": "soon"},
        {"result": 1},
    ],
)
def test_a_row_of_another_program_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match="the row of 'a' is not an outcome"):
        read_outcome(row(**fields))


def test_counts_of_one_state_add_up() -> None:
    counts = [("q", "ready", 2), ("q", "ready", 1), ("q", "held", 0), ("p", "dead", 0)]
    assert count_depths(counts) == {"q": Depth(ready=3)}
