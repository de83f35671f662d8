"""`FetchPlan`: from which queues a worker fetches, and how much, while its slots are taken."""

from __future__ import annotations

from typing import cast

import pytest

from aiotaskq.contract.message import Delivery
from aiotaskq.worker.execution import Execution
from aiotaskq.worker.fetch_plan import FetchPlan


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Held:
    """A stand-in for executions that are handed back: only their queues count."""

    def __init__(self, queue: str) -> None:
        self.delivery = Delivery(id="i", queue=queue, body=b"", receipt=1)


def back(*queues: str) -> list[Execution]:
    return cast("list[Execution]", [Held(queue) for queue in queues])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def plan(clock: Clock) -> FetchPlan:
    return FetchPlan(100, {"loop", "process"}, clock)


def test_nothing_is_planned_where_nothing_had_to_wait(plan: FetchPlan) -> None:
    plan.accepted("q", None)
    assert plan.is_open
    assert plan.calls(["q", "p"]) == [(["q", "p"], 100)]


def test_a_queue_whose_tasks_were_handed_back_is_left_out(plan: FetchPlan) -> None:
    plan.accepted("q", "process")
    assert plan.may_wait
    plan.handed_back("process", back("q"))
    assert plan.calls(["q"]) == []
    assert plan.calls(["a", "q", "b"]) == [(["a", "b"], 100)]
    assert not plan.may_wait


def test_it_is_fetched_from_again_when_a_slot_is_free_and_no_more_than_could_start(
    plan: FetchPlan,
) -> None:
    plan.accepted("q", "process")
    plan.handed_back("process", back("q"))
    plan.freed("thread")
    assert plan.calls(["q"]) == []
    plan.freed("process")
    assert plan.may_wait
    assert plan.calls(["q", "p"]) == [(["q"], 1), (["p"], 100)]
    assert plan.narrowest == 1
    for _ in range(3):  # three more start, then one has to wait
        plan.accepted("q", None)
    plan.accepted("q", "process")
    plan.handed_back("process", back("q"))
    plan.freed("process")
    assert plan.calls(["q"]) == [(["q"], 3)]


def test_the_window_grows_until_the_queue_is_open_again(plan: FetchPlan) -> None:
    plan.accepted("q", "process")
    plan.handed_back("process", back("q"))
    plan.freed("process")
    sizes: list[int] = []
    while not plan.is_open:
        [(_, most)] = plan.calls(["q"])
        sizes.append(most)
        plan.accepted("q", None)
        assert plan.fetched(["q"]) == set()
    assert sizes == [1, 2, 4, 8, 16, 32, 64]


def test_probes_come_less_often_and_find_nothing_in_a_queue_of_one_kind(
    plan: FetchPlan, clock: Clock
) -> None:
    plan.accepted("q", "process")
    plan.handed_back("process", back("q"))
    pauses: list[float] = []
    depths: list[int] = []
    for _ in range(8):
        pause = plan.next_probe()
        assert pause is not None
        pauses.append(round(pause, 3))
        clock.now += pause
        [(queues, most)] = plan.calls(["q"])
        depths.append(most)
        assert not plan.may_wait
        plan.accepted("q", "process")
        assert plan.fetched(queues) == {"process"}  # hand it back at once
        plan.handed_back("process", back("q"))
    assert pauses == [0.1, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert depths == [16, 16, 16, 100, 16, 16, 16, 100]


def test_a_mixed_queue_is_left_out_for_a_moment_only(plan: FetchPlan, clock: Clock) -> None:
    plan.accepted("q", "process")
    plan.handed_back("process", back("q"))
    clock.now += 0.2
    [(queues, _)] = plan.calls(["q"])
    plan.accepted("q", "process")
    plan.accepted("q", None)
    assert plan.fetched(queues) == set()  # what waits is held
    assert plan.is_mixed("process")
    assert plan.may_wait
    assert plan.calls(["q"]) == [(["q"], 100)]
    plan.handed_back("process", back("q"))
    pause = plan.next_probe()
    assert pause is not None
    assert pause < 0.05
    clock.now += pause
    assert plan.calls(["q"]) == [(["q"], 100)]


def test_a_probe_of_an_empty_queue_ends_it(plan: FetchPlan, clock: Clock) -> None:
    plan.accepted("q", "process")
    plan.handed_back("process", back("q"))
    clock.now += 0.2
    [(queues, _)] = plan.calls(["q"])
    for executor in plan.fetched(queues):  # other workers have taken all of it
        plan.handed_back(executor, [])
    assert plan.may_wait


def test_a_worker_with_tasks_of_one_kind_has_no_reason_to_probe(clock: Clock) -> None:
    plan = FetchPlan(100, {"process"}, clock)
    plan.accepted("q", "process")
    plan.handed_back("process", back("q"))
    clock.now += 4.0
    assert plan.calls(["q"]) == []
    plan.freed("process")
    assert plan.calls(["q"]) == [(["q"], 1)]
