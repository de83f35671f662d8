"""The control: the checker finds the losses of a worker that settles before it runs."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.ledger import Started
from tests.faults.producer import Some
from tests.faults.scene import ONE_BROKER, PATIENCE, Scene


@pytest.mark.parametrize("broker", ONE_BROKER, indirect=True)
async def test_a_worker_that_settles_first_is_caught(scene: Scene) -> None:
    scene.fleet.more["AIOTASKQ_TESTS_FAULTS_LOSSY"] = "1"
    await scene.fleet.worker("-c", "20", processes=2)
    scene.producer(Some("quick", 30, {"seconds": 5.0}))
    running = await scene.ledger.count(Started, 10, within=PATIENCE)
    victim = running[-1].pid
    scene.nemesis.strike("kill", [victim])
    os.kill(victim, signal.SIGKILL)
    await scene.drain(within=2.0)
    verdict = await scene.verdict()
    assert verdict.counts["lost"] > 0
    assert any(problem.startswith("U1: acknowledged and never") for problem in verdict.problems)
    assert verdict.counts["acknowledged"] == verdict.counts["attempted"]
