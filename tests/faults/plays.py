"""Steps that several tests share."""

from __future__ import annotations

from tests.faults.ledger import Started
from tests.faults.producer import Some
from tests.faults.scene import PATIENCE, Scene, scaled


async def kill_workers(scene: Scene) -> None:
    """Kill worker processes in the middle of tasks, one after another."""
    # Only poison counts as the cause of crashes, not the tasks beside it.
    scene.set(max_crashes=50)
    await scene.fleet.team(2, "-c", "20", processes=2)
    # At any time, some of the longer tasks run in each process.
    count = scaled(200, 4000)
    longer = Some("quick", count // 4, {"seconds": [0.2, 0.8]})
    scene.producer(*scene.mix(count), longer, rate=scaled(100, 150))
    await scene.ledger.count(Started, 20, within=PATIENCE)  # the producer may take long to start
    await scene.nemesis.run(
        [scene.nemesis.kill_worker()], times=scaled(4, 25), every=(0.4, scaled(0.8, 1.5))
    )
