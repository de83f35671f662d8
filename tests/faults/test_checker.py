"""The checker, on made-up histories with one problem each: it finds that one alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.faults.checker import Allowed, Facts, Final, Letter, check
from tests.faults.ledger import (
    Acknowledged,
    Attempted,
    Down,
    Ended,
    Fault,
    Ledger,
    Line,
    Said,
    Sampled,
    Started,
    Writer,
)

CHAIN = (
    "Traceback (most recent call last):\n  File x\nasyncio.exceptions.CancelledError\n\n"
    "The above exception was the direct cause of the following exception:\n\n"
)
HEADER = "Traceback (most recent call last):\n  File y\n"
LATE = "aiotaskq.errors.TimeLimitExceeded: late\n"


def life(key: str, *, at: float = 1.0, pid: int = 10, task: str = "quick") -> list[Line]:
    """Return the history of a task that succeeds."""
    return [
        Attempted(at=at, key=key, task=task),
        Acknowledged(at=at + 0.1, key=key, task_id=f"id-{key}"),
        *one_run(key, at=at + 0.2, pid=pid, task=task),
        Sampled(at=at + 0.4, task_id=f"id-{key}", status="SUCCESS", print="a"),
    ]


def one_run(
    key: str, *, at: float, pid: int = 10, attempt: int = 1, task: str = "quick"
) -> list[Line]:
    return [
        Started(at=at, key=key, task_id=f"id-{key}", task=task, attempt=attempt, pid=pid),
        Ended(at=at + 0.1, key=key, task_id=f"id-{key}", attempt=attempt, pid=pid, how="returned"),
    ]


GOOD = Facts(
    lines=[*life("a"), *life("b")],
    lease=1.0,
    outcomes={"id-a": Final("SUCCESS", "a"), "id-b": Final("SUCCESS", "b")},
    drained=3.0,
)


def found(facts: Facts, allowed: Allowed | None = None) -> list[str]:
    verdict = check(msgspec.structs.replace(facts, lines=sorted(facts.lines, key=_at)), allowed)
    return [problem.partition(":")[0] for problem in verdict.problems]


def _at(line: Line) -> float:
    return line.at


def but(*lines: Line, without: type[Line] | None = None, **more: object) -> Facts:
    """Return the good history with more lines, or without some of task b."""
    kept = [
        line
        for line in GOOD.lines
        if without is None or not isinstance(line, without) or getattr(line, "key", "") == "a"
    ]
    return msgspec.structs.replace(GOOD, lines=[*kept, *lines], **more)


def test_a_good_history_is_good() -> None:
    verdict = check(GOOD)
    assert not verdict.problems
    assert verdict.counts["attempted"] == verdict.counts["ok"] == 2


def test_a_task_that_was_acknowledged_and_never_ended() -> None:
    lost = but(outcomes={"id-a": Final("SUCCESS", "a")})
    assert found(lost) == ["U1"]
    assert check(lost).counts["lost"] == 1
    assert found(lost, Allowed(lost=True)) == []


def test_a_task_that_was_never_acknowledged_may_be_there_or_not() -> None:
    assert found(but(without=Acknowledged)) == []
    assert check(but(without=Acknowledged)).counts["recovered"] == 1
    gone = but(Attempted(key="c", task="quick"))
    assert found(gone) == []


def test_an_innocent_among_the_dead_letters() -> None:
    facts = but(letters=[Letter("id-b", "2 workers died while running it")])
    assert found(facts) == ["U1"]
    dead = frozenset({"dead"})
    assert found(facts, Allowed(endings={"quick": dead | {"ok"}})) == []


def test_a_task_that_failed_and_should_not() -> None:
    outcomes = {**GOOD.outcomes, "id-b": Final("FAILURE")}
    assert found(but(outcomes=outcomes)) == ["U1"]


def test_a_task_that_nobody_sent() -> None:
    assert found(but(*one_run("c", at=2.0))) == ["U2"]
    assert found(but(outcomes={**GOOD.outcomes, "id-c": Final("SUCCESS", "c")})) == ["U2"]
    assert found(but(letters=[Letter("id-c", "?")])) == ["U2"]


def test_an_outcome_that_changed() -> None:
    again = Sampled(at=5.0, task_id="id-b", status="SUCCESS", print="b")
    assert found(but(again)) == ["U3"]
    same = Sampled(at=5.0, task_id="id-b", status="SUCCESS", print="a")
    assert found(but(same)) == []


def test_a_success_that_no_run_returned() -> None:
    assert found(but(without=Ended)) == ["U3"]


def test_the_result_of_another_task() -> None:
    assert found(but(outcomes={**GOOD.outcomes, "id-b": Final("SUCCESS", "a")})) == ["U3"]


def test_a_task_that_ran_twice_for_no_reason() -> None:
    twice = one_run("b", at=2.0, pid=11)
    assert found(but(*twice)) == ["U4"]
    assert check(but(*twice)).counts["second runs"] == 1


@pytest.mark.parametrize(
    ("fault", "explains"),
    [
        (Fault(at=1.25, kind="kill", pids=(10,), until=1.25), True),
        (Fault(at=1.25, kind="kill", pids=(11,), until=1.25), False),  # another process
        (Fault(at=2.5, kind="kill", pids=(10,), until=2.5), False),  # after the second run
        (Fault(at=0.1, kind="kill", pids=(10,), until=0.15), False),  # over before the first
        (
            Fault(at=1.1, kind="freeze", pids=(11,), until=1.9),
            True,
        ),  # a freeze of the second worker, which woke up too late
        (
            Fault(at=0.1, kind="freeze", pids=(11,), until=0.9),
            False,
        ),  # a freeze that ended long before
        (Fault(at=0.1, kind="pause", until=1.3), True),  # a fault of a server
        (Fault(at=0.1, kind="pause", until=0.15), False),
    ],
)
def test_a_second_run_that_a_fault_explains(fault: Fault, explains: bool) -> None:
    facts = but(fault, *one_run("b", at=2.0, pid=11))
    assert found(facts) == ([] if explains else ["U4"])


def test_more_second_runs_than_a_scenario_takes() -> None:
    fault = Fault(at=1.25, kind="kill", pids=(10,), until=1.25)
    assert found(but(fault, *one_run("b", at=2.0)), Allowed(duplicates=0)) == ["U4"]


def test_other_attempts_are_no_second_runs() -> None:
    assert found(but(*one_run("b", at=2.0, attempt=2))) == []
    # The second one first.
    assert found(but(*one_run("b", at=0.5, attempt=2))) == ["U8"]


def test_messages_that_are_left_in_the_queue() -> None:
    assert found(but(waiting={"default held": 1})) == ["U5"]
    assert found(but(waiting={"default held": 0})) == []


def test_a_queue_that_drains_too_slowly() -> None:
    fault = Fault(at=1.25, kind="kill", until=1.25)
    assert found(but(fault, drained=60.0), Allowed(drain=58.0)) == ["U5"]
    assert found(but(fault, drained=60.0), Allowed(drain=59.0)) == []


def test_keys_and_processes_that_are_left() -> None:
    assert found(but(leftovers=["aiotaskq:odd"])) == ["U6"]
    assert found(but(alive=["12 python"])) == ["U7"]


def test_a_worker_that_stays_unhealthy() -> None:
    sick = Said(at=2.0, pid=10, event="HealthChanged", note="{'problems': \"('no broker',)\"}")
    well = Said(at=3.0, pid=10, event="HealthChanged", note="{'problems': '()'}")
    assert found(but(sick)) == ["U9"]
    assert found(but(sick, well)) == []
    assert found(but(sick, Down(at=2.5, pid=10, worker="w"))) == []  # the process was replaced
    assert found(but(sick, Down(at=3.5, pid=10, worker="w"))) == ["U9"]
    assert found(but(sick, Fault(at=2.5, kind="kill", pids=(10,), until=2.5))) == []


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("[ERROR] Task exception was never retrieved\n", True),
        ("[ERROR] Task was destroyed but it is pending!\n", True),
        ("oh\nTraceback (most recent call last):\n  File x\n    y\nKeyError: 1\nmore\n", True),
        ("Traceback (most recent call last):\n  File x\n\n    y\nValueError\n", True),
        ("Traceback (most recent call last):\n  F\ntests.faults.application.Planned: 1\n", False),
        (CHAIN + LATE, False),
        (CHAIN + HEADER + LATE, False),
        (CHAIN + CHAIN + HEADER + LATE, False),
        (CHAIN + "KeyError: 1\n", True),
        (CHAIN + HEADER + "KeyError: 1\n", True),
        (CHAIN + HEADER + LATE + HEADER + "KeyError: 1\n", True),
        ("[INFO] ready\n", False),
    ],
)
def test_logs_that_tell_of_a_fault_of_the_workers_own(text: str, bad: bool) -> None:
    assert found(but(logs={"worker-1": text})) == (["U10"] if bad else [])


def test_an_error_in_the_log_that_a_scenario_expects() -> None:
    text = "Traceback (most recent call last):\n  F\nKeyError: 1\n"
    assert found(but(logs={"worker-1": text}), Allowed(errors=["KeyError"])) == []


def test_a_report_tells_the_story_of_what_was_lost() -> None:
    verdict = check(but(outcomes={"id-a": Final("SUCCESS", "a")}))
    assert "b (id-b, None): 1.000 Attempted task=quick | 1.100 Acknowledged" in str(verdict)


def test_a_line_that_was_not_written_whole_is_not_read_yet(tmp_path: Path) -> None:
    writer, ledger = Writer(tmp_path, "test"), Ledger(tmp_path)
    writer.write(Attempted(at=1.0, key="a", task="quick"))
    (path,) = tmp_path.iterdir()
    text = path.read_bytes()
    with path.open("ab") as file:
        file.write(text[:-5])
        file.flush()
        assert ledger.of(Attempted) == [Attempted(at=1.0, key="a", task="quick")]
        file.write(text[-5:])
    assert len(ledger.of(Attempted)) == 2
