"""All faults of processes, again and again: ``make soak MINUTES=60``.

One program is never hit. Neither its memory, files and threads nor the store may grow.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
import redis

from tests.faults.fleet import Program
from tests.faults.scene import Scene

MINUTES = float(os.environ.get("AIOTASKQ_TESTS_SOAK_MINUTES", "1"))
ROUND = 60.0  # seconds of faults between two measurements
GROWTH = 1.1  # the largest ratio at the end to the median of the first third of the rounds
SLACK = {"resident MiB": 16.0, "file descriptors": 8.0, "threads": 4.0, "store MiB": 16.0}


@pytest.mark.timeout(0)
async def test_soak(scene: Scene) -> None:
    scene.set(max_crashes=1000, result_expires=60)
    quiet = await scene.fleet.worker("-c", "20", processes=2)
    await scene.fleet.team(2, "-c", "20", processes=2)
    scene.nemesis.spared.append(quiet)
    series: dict[str, list[float]] = defaultdict(list)
    end = time.monotonic() + MINUTES * 60
    while time.monotonic() < end or len(series["threads"]) < 3:
        await one_round(scene, min(ROUND, MINUTES * 20))
        for name, value in measure(quiet, scene.broker).items():
            series[name].append(value)
        print({name: round(values[-1], 1) for name, values in series.items()}, flush=True)  # noqa: T201
        scene.forget()
    await scene.check()
    grown = [told for name, values in series.items() if (told := growth(name, values))]
    assert not grown, (scene.seed, grown)


async def one_round(scene: Scene, seconds: float) -> None:
    """Run all faults for some seconds, and check that nothing was lost."""
    scene.producer(*scene.mix(int(seconds * 60)), rate=60)
    nemesis, fresh = scene.nemesis, ("-c", "20")
    await nemesis.run(
        [
            nemesis.kill_worker(),
            nemesis.kill_helper(),
            nemesis.kill_program(*fresh, processes=2),
            nemesis.replace_program(*fresh, processes=2),
            nemesis.freeze_worker((0.2, 5.0)),
            nemesis.freeze_program((0.2, 5.0)),
        ],
        seconds=seconds,
        every=(0.2, 5.0),
    )
    await scene.drain()
    verdict = await scene.judge()
    assert not verdict.problems, f"{scene.told()}\n{verdict}"
    print(verdict, flush=True)  # noqa: T201


def measure(program: Program, broker: str) -> Mapping[str, float]:
    """Return the resources that a program and the store use."""
    used: dict[str, float] = defaultdict(float)
    for process in program.family():
        with contextlib.suppress(psutil.Error):
            used["resident MiB"] += process.memory_info().rss / 2**20
            used["file descriptors"] += process.num_fds()
            used["threads"] += process.num_threads()
    if broker.startswith("redis"):
        with redis.Redis.from_url(broker) as client:
            memory = client.info("memory")
            used["store MiB"] = float(memory["used_memory"]) / 2**20
    else:
        used["store MiB"] = Path(broker.removeprefix("sqlite:///")).stat().st_size / 2**20
    return used


def growth(name: str, values: Sequence[float]) -> str:
    """Describe the growth from the first third to the last one; empty if there is none."""
    third = max(1, len(values) // 3)
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    if last <= first * GROWTH + SLACK[name]:
        return ""
    return f"{name} grew from {first:.1f} to {last:.1f}: {[round(value, 1) for value in values]}"
