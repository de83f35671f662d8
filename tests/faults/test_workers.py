"""Worker processes that die, freeze and are replaced."""

from __future__ import annotations

import signal

import pytest

from tests.faults.checker import Allowed
from tests.faults.ledger import Acknowledged, Ended, Fault, Said, Started
from tests.faults.plays import kill_workers
from tests.faults.producer import Some
from tests.faults.scene import ONE_BROKER, PATIENCE, Scene, scaled

POINTS = ("fetch", "received", "started", "succeeded", "store", "settle")


async def test_t01_workers_are_killed_in_the_middle_of_tasks(scene: Scene) -> None:
    await kill_workers(scene)
    await scene.drain()
    verdict = await scene.check()
    assert verdict.counts["faults"] == scaled(4, 25)


async def test_t01_supervisors_are_killed(scene: Scene) -> None:
    scene.set(max_crashes=50)
    await scene.fleet.team(2, "-c", "20", processes=2)
    scene.producer(*scene.mix(scaled(200, 5000)), rate=scaled(100, 100))
    await scene.nemesis.run(
        [scene.nemesis.kill_program("-c", "20", processes=2)],
        times=scaled(1, 12),
        every=(0.5, scaled(0.8, 3.0)),
    )
    await scene.drain()
    await scene.check()


async def test_t02_t04_workers_die_at_each_step(scene: Scene) -> None:
    times = scaled(1, 8)
    scene.set(max_crashes=50)
    scene.fleet.more["AIOTASKQ_TESTS_FAULTS_DIE"] = ",".join(f"{point}:{times}" for point in POINTS)
    for _ in range(2):  # without waiting: they may die before they are ready
        await scene.fleet.worker("-c", "10", processes=2, ready=False)
    scene.producer(*scene.mix(scaled(150, 1500)), rate=100)
    await scene.drain()
    verdict = await scene.check()
    died = [fault.kind for fault in scene.ledger.of(Fault)]
    assert sorted(died) == sorted(f"dies at {point}" for point in POINTS for _ in range(times))
    assert verdict.counts["second runs"] <= 10 * len(died)


async def test_t05_what_runs_is_finished_when_a_worker_is_told_to_stop(scene: Scene) -> None:
    first = await scene.fleet.worker("-c", "10", "--grace-period", "40")
    scene.producer(Some("quick", 20, {"seconds": 1.0}), rate=1000)
    await scene.ledger.count(Started, 10, within=PATIENCE)
    await scene.sent()
    assert await scene.fleet.stop(first) == [0]
    begun = scene.ledger.of(Started)
    assert len(scene.ledger.of(Ended)) == len(begun)
    await scene.fleet.worker("-c", "20")
    await scene.drain()
    verdict = await scene.check(Allowed(duplicates=0))
    assert verdict.counts["second runs"] == 0
    # Tasks that had not begun kept their place: the oldest began first.
    order = [line.key for line in scene.ledger.of(Started)]
    assert {int(key.partition("-")[2]) for key in order[: len(begun)]} == set(range(len(begun)))


@pytest.mark.parametrize("signals", [1, 2])
async def test_t06_what_outlasts_the_grace_period_goes_to_another(
    scene: Scene, signals: int
) -> None:
    grace = "0.3" if signals == 1 else "600"
    first = await scene.fleet.worker("-c", "10", "--grace-period", grace)
    scene.producer(Some("again", 5, {"seconds": 600}), rate=1000)
    await scene.ledger.count(Started, 5, within=PATIENCE)
    await scene.sent()
    scene.nemesis.strike("terminated", [process.pid for process in first.family()])
    first.signal(signal.SIGTERM)
    if signals == 2:
        await scene.until_logged(first, "stopping")
        first.signal(signal.SIGTERM)
    assert await first.wait() == 0
    assert {line.how for line in scene.ledger.of(Ended)} == {"CancelledError"}
    released = [line for line in scene.ledger.of(Said) if line.event == "Released"]
    assert len(released) == 5
    await scene.fleet.worker("-c", "10")
    await scene.drain()
    verdict = await scene.check()
    assert verdict.counts["second runs"] == 5
    assert {line.attempt for line in scene.ledger.of(Started)} == {1}


@pytest.mark.parametrize("broker", ONE_BROKER, indirect=True)
async def test_t07_a_new_release_takes_over(scene: Scene) -> None:
    old = await scene.fleet.team(2, "-c", "20")
    count = scaled(250, 4000)
    scene.producer(*scene.mix(count), Some("novel", count // 20), rate=scaled(100, 120))
    for program in old:
        # Both releases run until the old one has got tasks that it does not know.
        await scene.until_logged(program, "unknown here")
        await scene.fleet.worker("-c", "20", target="tests.faults.later:app")
        assert await scene.fleet.stop(program) == [0]
    await scene.drain()
    verdict = await scene.check(Allowed(duplicates=0))
    assert verdict.counts["ok"] == len(scene.ledger.of(Acknowledged))
    assert len([line for line in scene.ledger.of(Started) if line.task == "novel"]) == count // 20


async def test_t10_a_worker_is_frozen_for_longer_than_its_lease(scene: Scene) -> None:
    scene.set(worker_lease=1.5, worker_heartbeat=0.3, max_crashes=50)
    await scene.fleet.worker("-c", "10", processes=2)
    scene.producer(*scene.mix(scaled(200, 4000)), rate=scaled(100, 100))
    await scene.nemesis.run(
        [scene.nemesis.freeze_worker((2.5, 3.5))], times=scaled(1, 15), every=(0.4, 0.8)
    )
    await scene.drain()
    await scene.check()


async def test_t11_a_whole_program_is_frozen_for_longer_than_its_lease(scene: Scene) -> None:
    scene.set(worker_lease=1.5, worker_heartbeat=0.3)
    zombie = await scene.fleet.worker("-c", "10", processes=2)
    # All its slots are taken when it freezes, though the machine may be busy.
    scene.producer(Some("quick", 20, {"seconds": 3.0}), rate=1000)
    await scene.ledger.count(Started, 20, within=PATIENCE)
    held = {line.key for line in scene.ledger.of(Started)}
    pids = {process.pid for process in zombie.family()}
    second = await scene.freeze_and_start(zombie.family(), "-c", "20")
    await scene.drain()
    others = {line.key for line in scene.ledger.of(Started) if line.pid not in pids}
    assert others >= held
    # Its late outcomes were refused; it starts a new lease, and takes tasks as before.
    await scene.fleet.stop(second)
    scene.producer(Some("quick", 20), rate=1000)
    await scene.drain()
    verdict = await scene.check()
    assert verdict.counts["ok"] == 40
    refused = [line for line in scene.ledger.of(Said) if line.event == "Refused"]
    assert refused or "going on under a new lease" in zombie.output


async def test_everything_at_once(scene: Scene) -> None:
    scene.set(max_crashes=50)
    await scene.fleet.team(2, "-c", "20", processes=2)
    scene.producer(*scene.mix(scaled(250, 12000)), rate=scaled(80, 100))
    nemesis = scene.nemesis
    await nemesis.run(
        [
            nemesis.kill_worker(),
            nemesis.kill_helper(),
            nemesis.kill_program("-c", "20", processes=2),
            nemesis.replace_program("-c", "20", processes=2),
            nemesis.freeze_worker((0.2, 4.0)),
            nemesis.freeze_program((0.2, 4.0)),
        ],
        seconds=scaled(3, 110),
        every=(0.1, 1.0),
    )
    await scene.drain()
    await scene.check()
