"""Tasks that harm their workers, and other tasks beside them."""

from __future__ import annotations

import pytest

from tests.faults.checker import Allowed
from tests.faults.ledger import Acknowledged, Attempted, Ended, Fault, Said, Started, Up
from tests.faults.producer import Some
from tests.faults.scene import ONE_BROKER, PATIENCE, Scene, scaled

HOSTILE = (
    "unencodable",
    "lambda",
    "odd",
    "huge",
    "deep",
    "raise-hostile",
    "raise-huge",
    "raise-exit",
    "raise-local",
)


@pytest.mark.parametrize("broker", ["redis", "sqlite"][: len(ONE_BROKER)], indirect=True)
async def test_t08_t09_a_blocked_worker_keeps_its_tasks(scene: Scene) -> None:
    scene.set(worker_lease=1.5, worker_heartbeat=0.25)
    await scene.fleet.team(2, "-c", "5", processes=2)
    scene.producer(
        Some("blocking", scaled(1, 5), {"seconds": 6.0}),
        Some("hogging", scaled(1, 5), {"seconds": 3.0}),
        Some("quick", 50, {"seconds": [0.0, 0.5]}),
        rate=50,
    )
    await scene.drain()
    await scene.check(Allowed(duplicates=0))
    blocked = [line for line in scene.ledger.of(Said) if line.event == "LoopBlocked"]
    assert any("tests.faults.application.blocking" in line.note for line in blocked)


async def test_t12_poison_ends_among_the_dead_letters_and_takes_nobody_along(
    scene: Scene,
) -> None:
    poison = scaled(2, 5)
    await scene.fleet.worker("-c", "20", processes=3)
    scene.producer(*scene.mix(scaled(150, 2000)), Some("poison", poison), rate=100)
    await scene.drain(within=2 * PATIENCE)
    verdict = await scene.check(Allowed(drain=2 * PATIENCE))
    assert verdict.counts["dead"] == poison
    # Each poison task kills three workers, or two tasks kill one together; all are replaced.
    assert 3 <= len(scene.ledger.of(Fault)) <= 3 * poison
    assert len(scene.ledger.of(Up)) <= 3 + 3 * poison


async def test_t13_t14_what_a_task_does_to_itself_is_its_own_failure(scene: Scene) -> None:
    rounds = scaled(1, 20)
    scene.set(worker_process_pool_size=2)
    program = await scene.fleet.worker("-c", "10")
    scene.producer(
        *(Some("crash", rounds, {"how": how}) for how in ("segfault", "kill", "exit")),
        *(Some("hostile", rounds, {"what": what}) for what in HOSTILE),
        Some("process", 10 * rounds),
        Some("quick", 20 * rounds),
        rate=100,
    )
    await scene.drain()
    assert len(scene.fleet.workers(program)) == 1
    outcomes = await scene.observer.sample()
    sizes = [
        len(bytes(outcome.result)) + len(outcome.traceback or "") for outcome in outcomes.values()
    ]
    assert max(sizes) < 100_000
    verdict = await scene.check(Allowed(errors=[r".*Local", "RecursionError", r"\w+Error"]))
    assert verdict.counts["failed"] == rounds * (3 + len(HOSTILE))
    assert verdict.counts["second runs"] == 0
    assert len(scene.ledger.of(Up)) == 1


@pytest.mark.parametrize("broker", ONE_BROKER, indirect=True)
async def test_t15_a_task_that_will_not_be_cancelled_gives_its_slot_back(scene: Scene) -> None:
    count = scaled(2, 20)
    scene.set(task_cancel_grace=0.5, worker_max_stuck_tasks=100)
    await scene.fleet.worker("-c", "1")
    scene.producer(
        Some("swallower", count, {"seconds": 3.0}),
        Some("quick", 5),
        rate=1000,
        shuffled=False,
    )
    await scene.drain()
    order = {line.key: line.at for line in scene.ledger.of(Started) if line.task == "quick"}
    ended = await scene.ledger.count(
        Ended, count, within=PATIENCE, where=lambda line: line.key not in order
    )
    # The only slot was free again before the last of them had ended; their values are ignored.
    assert min(order.values()) < max(line.at for line in ended)
    assert {line.how for line in ended} == {"returned"}
    verdict = await scene.check()
    assert verdict.counts["failed"] == count
    assert len([line for line in scene.ledger.of(Said) if line.event == "Stuck"]) == count


@pytest.mark.parametrize("broker", ONE_BROKER, indirect=True)
async def test_t16_threads_that_do_not_end_cost_a_process_and_no_task(scene: Scene) -> None:
    count, most = scaled(12, 200), scaled(4, 10)
    scene.set(task_cancel_grace=0.3, worker_max_stuck_tasks=most, worker_grace_period=5)
    await scene.fleet.worker("-c", "20", "--threads", "4")
    scene.producer(Some("deaf", count, {"seconds": 4.0}), Some("quick", 10 * count), rate=100)
    await scene.drain()
    # Processes are replaced, and none has many more such threads than allowed.
    await scene.ledger.count(Up, 2, within=PATIENCE)
    # A process with too many may still be ending while new tasks come.
    scene.producer(Some("quick", 20), rate=4)
    await scene.drain()
    verdict = await scene.check()
    assert verdict.counts["failed"] == count
    pids = [line.pid for line in scene.ledger.of(Up)]
    deaf = [line.pid for line in scene.ledger.of(Started) if line.task == "deaf"]
    assert max(deaf.count(pid) for pid in pids) <= most + 3 * 20  # slots, between two measurements


async def test_t40_what_is_urgent_passes_a_backlog_and_a_storm_of_failures(scene: Scene) -> None:
    backlog = scaled(400, 20_000)
    slots = 10
    scene.producer(
        Some("quick", backlog, {"seconds": [0.0, 0.02]}),
        Some("flaky", backlog // 10, {"failures": 3}),
        rate=1_000_000,
        most=500,
    )
    await scene.sent()
    program = await scene.fleet.worker("-c", str(slots))
    urgent = scaled(20, 200)
    await scene.ledger.count(Started, slots, within=PATIENCE)
    scene.producer(Some("quick", urgent, {"seconds": 0.0}, {"priority": 9}), rate=100, most=1)
    await scene.drain()
    await scene.check()
    assert program.running is False
    began = [(line.at, line.key) for line in scene.ledger.of(Started)]
    stored = {line.key: line.at for line in scene.ledger.of(Acknowledged)}
    sent = {line.key: line.at for line in scene.ledger.of(Attempted)}
    for at, key in began:
        if key.startswith("p1-"):
            # Counted, not timed: tasks that passed it were already taken when it came.
            passed = [
                other
                for moment, other in began
                if stored[key] < moment < at and other.startswith("p0-")
            ]
            assert len(passed) <= 3 * slots, (key, at - sent[key])
