"""Run the benchmarks of aiotaskq on servers that it starts, and print a table.

``python -m benchmarks [MEASURE ...] [--quick] [--json FILE] [--runs N]``

Each figure is the median of several runs, with the smallest and the largest value. Absolute numbers
depend on the machine as much as on the code: compare two versions on one machine, in one session.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from aiotaskq import __version__
from benchmarks import micro
from benchmarks.drain import set_up_logging
from benchmarks.figures import Figure, Report, show
from benchmarks.measures import (
    asleep,
    delays,
    drains,
    idle,
    latency,
    million,
    processes,
    sends,
    shards,
    soak,
    start,
)
from benchmarks.measures.bench import Bench

Measure: TypeAlias = Callable[[Bench], Iterator[Figure]]

MEASURES: dict[str, Measure] = {
    "drain": drains.measure,
    "send": sends.measure,
    "latency": latency.measure,
    "delays": delays.measure,
    "processes": processes.measure,
    "asleep": asleep.measure,
    "million": million.measure,
    "idle": idle.measure,
    "start": start.measure,
}
BY_NAME_ONLY: dict[str, Measure] = {
    "micro": micro.measure,
    "shards": shards.measure,
    "soak": soak.measure,
}
EVERY = {**MEASURES, **BY_NAME_ONLY}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _options(arguments)
    set_up_logging()
    # Without a terminal, lines are not broken at its width.
    console = Console(width=None if sys.stdout.isatty() else 140)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Bench(
                Path(folder), quick=options.quick, runs=options.runs, tasks=options.tasks
            ) as bench:
                for measure in _chosen(options.measures):
                    for figure in measure(bench):
                        report.figures.append(figure)
                        console.print(_line(figure), highlight=False, soft_wrap=True)
                report = Report(report.figures, bench.versions())
        finally:  # if one fails, the figures before it are not lost
            show(
                report.figures,
                title=f"aiotaskq {__version__}, {os.cpu_count()} cores",
                console=console,
            )
            if options.json:
                report.write(options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run the benchmarks of aiotaskq on servers that it starts, and print a table.",
    )
    parser.add_argument(
        "measures",
        nargs="*",
        metavar="MEASURE",
        help=f"{', '.join(MEASURES)}; the default is all of these; these run only if they are"
        f" named: {', '.join(BY_NAME_ONLY)}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few tasks and one run, to see whether it works"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run to this file")
    parser.add_argument(
        "--runs", type=_positive, metavar="N", help="number of runs for each figure"
    )
    parser.add_argument(
        "--tasks",
        type=_positive,
        metavar="N",
        help=f"number of tasks of the soak; default {soak.TASKS:,}",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.measures if name not in (*EVERY, "all")]
    if unknown:
        parser.error(f"no measure {unknown[0]!r}; there are {', '.join((*EVERY, 'all'))}")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _chosen(names: Sequence[str]) -> list[Measure]:
    chosen: dict[str, Measure] = {}
    for name in names or ["all"]:
        chosen.update(MEASURES if name == "all" else {name: EVERY[name]})
    return list(chosen.values())


def _line(figure: Figure) -> str:
    return f"{figure.measure}: {figure.median:,.2f} {figure.unit}"


if __name__ == "__main__":
    main()
