"""The benchmarks: each of them with few tasks, and their computations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.__main__ import EVERY
from benchmarks.measures.bench import cpu_seconds, percentile
from benchmarks.measures.sleeper import steady_share
from benchmarks.measures.soak import growth

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.usefixtures(
    "redis_server", "postgres_server"
)  # only to skip the test where they are missing
@pytest.mark.parametrize("name", EVERY)
def test_each_measure_yields_its_figures(name: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = bench(name, "--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    figures = report["figures"]
    assert figures
    for figure in figures:
        assert figure["runs"], figure
        assert all(math.isfinite(value) for value in figure["runs"]), figure
        # Growth and differences may be negative.
        signed = "growth" in figure["measure"] or "beyond" in figure["measure"]
        assert signed or min(figure["runs"]) > 0, figure
        assert figure["measure"] in done.stdout.replace("\n", " "), done.stdout
    assert len({figure["measure"] for figure in figures}) == len(figures)
    assert report["versions"]["msgspec"]


def test_an_unknown_measure_is_refused_with_the_names_that_there_are() -> None:
    done = bench("drian")
    assert done.returncode == 2
    assert "no measure 'drian'" in done.stderr
    assert all(name in done.stderr for name in EVERY)


def test_no_runs_at_all_are_refused() -> None:
    done = bench("drain", "--runs", "0")
    assert done.returncode == 2
    assert "--runs: '0' is not a whole number of at least 1" in done.stderr


def test_the_rate_of_sleepers_leaves_out_how_the_slots_were_filled() -> None:
    # Two slots, one second for each task; the second slot was filled half a second later.
    woken = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert steady_share(woken, 2, 1.0) == pytest.approx(1.0)
    # The same, with each turn a quarter longer.
    woken = [1.25, 1.75, 2.5, 3.0, 3.75, 4.25]
    assert steady_share(woken, 2, 1.0) == pytest.approx(0.8)


def test_growth_is_between_the_second_quarter_of_the_looks_and_the_last() -> None:
    assert growth([50, 60, 100, 100, 101, 103, 110, 110]) == pytest.approx(10)
    assert growth([50, 60, 100, 100, 100, 100, 90, 90]) == pytest.approx(-10)


@pytest.mark.parametrize(("percent", "value"), [(50, 50), (99, 99), (100, 100), (0.5, 1)])
def test_so_many_percent_do_not_exceed_a_percentile(percent: float, value: float) -> None:
    assert percentile(range(1, 101), percent) == value


def test_cpu_time_is_that_of_all_threads_and_agrees_with_psutil() -> None:
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    told = sum(psutil.Process().cpu_times()[:2])
    assert cpu_seconds(os.getpid()) == pytest.approx(told, abs=0.1)
    assert cpu_seconds(os.getpid(), os.getpid()) == pytest.approx(2 * told, abs=0.2)
