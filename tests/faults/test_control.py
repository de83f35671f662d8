"""The control: the checker finds the losses of a worker that settles before it runs."""

from __future__ import annotations

import pytest

from tests.faults.plays import kill_workers
from tests.faults.producer import Some
from tests.faults.scene import ONE_BROKER, Scene


@pytest.mark.parametrize("broker", ONE_BROKER, indirect=True)
async def test_a_worker_that_settles_first_is_caught(scene: Scene) -> None:
    scene.fleet.more["AIOTASKQ_TESTS_FAULTS_LOSSY"] = "1"
    # They wait for the workers, and run long enough for any kill to hit some of them.
    scene.producer(Some("quick", 60, {"seconds": [3.0, 6.0]}))
    await kill_workers(scene)
    await scene.drain(within=2.0)
    verdict = await scene.verdict()
    assert verdict.counts["lost"] > 0
    assert any(problem.startswith("U1: acknowledged and never") for problem in verdict.problems)
    assert verdict.counts["acknowledged"] == verdict.counts["attempted"]
