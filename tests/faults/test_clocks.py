"""Wrong clocks of workers and senders, and a clock that jumps."""

from __future__ import annotations

import pytest

from tests.faults.checker import Allowed
from tests.faults.ledger import Attempted, Fault, Started
from tests.faults.producer import Some
from tests.faults.scene import Scene, scaled

SKEWED = "tests.faults.skewed"


@pytest.mark.parametrize(
    "broker", ["redis"], indirect=True
)  # processes with one file share one clock
async def test_t34_workers_and_senders_whose_clocks_disagree(scene: Scene) -> None:
    scene.set(max_crashes=50)
    for skew in ("-3600", "0", "3600"):
        await scene.fleet.worker("-c", "20", module=SKEWED, AIOTASKQ_TESTS_FAULTS_SKEW=skew)
    count = scaled(75, 2000)
    for skew in ("-3600", "3600"):
        scene.producer(
            *scene.mix(count),
            Some("quick", count // 10, {}, {"countdown": 1.5}),
            Some("quick", count // 10, {}, {"countdown": 0.5, "expires": 600}),
            Some("quick", count // 10, {}, {"expires": 600}),
            Some("flaky", count // 10, {"failures": 3}),
            rate=50,
            skew=skew,
        )
    await scene.nemesis.run([scene.nemesis.kill_worker()], times=scaled(2, 20), every=(0.4, 1.0))
    await scene.drain()
    await scene.check()
    sent = {line.key: line for line in scene.ledger.of(Attempted)}
    first: dict[str, float] = {}
    for line in scene.ledger.of(Started):
        first.setdefault(line.key, line.at)
    delayed = [line for line in sent.values() if line.countdown]
    assert delayed
    assert not [line for line in delayed if first[line.key] - line.at < line.countdown]


async def test_t34_the_clock_jumps_by_an_hour_under_running_workers(scene: Scene) -> None:
    await scene.fleet.team(2, "-c", "20", module=SKEWED, AIOTASKQ_TESTS_FAULTS_SKEW="now+3600")
    scene.producer(*scene.mix(scaled(200, 2000)), rate=100)
    await scene.ledger.count(Started, 50, within=120)
    with scene.nemesis.lasting("clock jumps"):
        (scene.folder / "jump").touch()
    await scene.drain()
    await scene.check(Allowed(duplicates=0))
    assert len(scene.ledger.of(Fault)) == 1
