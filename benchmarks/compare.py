"""Compare aiotaskq with other task queues under the same load; in each round all take turns.

``python -m benchmarks.compare [--only taskiq,saq] [--workloads noop,sync] [--rounds N] [--quick]
[--json FILE]``

Each library is installed in its own virtual environment, with pinned versions. The program starts
the servers that are needed: Redis, PostgreSQL, RabbitMQ. With ``--only``, aiotaskq takes part on
the servers of the named libraries. If a library fails, its error is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.figures import Figure, Report
from benchmarks.rivals import drains, workloads
from benchmarks.rivals.contestants import Contestant, Failed, find
from benchmarks.rivals.processes import GroupWatchdog, ask, worker_of
from benchmarks.rivals.stores import PostgresStore, RabbitStore, RedisStore, Store
from tests.servers import ServerFailed, ServerMissing, Watchdog

ASK_TIMEOUT = 300.0  # seconds
CALLERS = 100
SENT = 10_000
TRIPS = 500
QUICK_DRAIN, QUICK_SENT, QUICK_TRIPS = 1_000, 1_000, 50
SENDING = ("enqueue", "bulk", "roundtrip")
TITLES = {
    "noop": "no-op tasks (coroutines, if the library has them)",
    "sync": "plain functions",
    "sleep": "tasks that sleep for 1 to 50 ms",
    "cpu": "tasks that are busy for 200 µs",
    "payload": "no-op tasks with an argument of 100 kB",
    "enqueue": f"sent one by one from {CALLERS} callers",
    "bulk": "sent in batches of 1,000",
    "roundtrip": "sent and waited for, one at a time, idle worker",
}

_STORES: dict[str, Callable[[Watchdog], Store]] = {
    "redis": RedisStore,
    "postgres": PostgresStore,
    "rabbitmq": RabbitStore,
}

# The figures of a workload: name, unit. The first one is compared.
DRAIN_PARTS = (
    ("rate", "tasks/s"),
    ("worker CPU", "µs/task"),
    ("server CPU", "µs/task"),
    ("peak memory", "MB"),  # of the worker's processes; shared memory counts for each
)
SEND_PARTS = (("rate", "tasks/s"),)
TRIP_PARTS = (("p50", "ms"), ("p99", "ms"))

Values = tuple[float, ...]


@dataclass
class Comparison:
    """All figures, and all failures."""

    values: dict[tuple[str, str], list[Values]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[tuple[str, str], str] = field(default_factory=dict)  # by contestant, workload
    settled: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def figures(self) -> Iterator[Figure]:
        """Yield every figure of every workload of every contestant."""
        for (who, workload), runs in self.values.items():
            for number, (part, unit) in enumerate(parts(workload)):
                yield Figure(f"{workload}: {part}", unit, [run[number] for run in runs], who=who)


def parts(workload: str) -> tuple[tuple[str, str], ...]:
    """Return the figures of a workload: names and units."""
    if workload == "roundtrip":
        return TRIP_PARTS
    return SEND_PARTS if workload in SENDING else DRAIN_PARTS


class Sitting:
    """One session: the servers, and the contestants that are measured on them."""

    def __init__(self, contestants: list[Contestant], *, quick: bool) -> None:
        self.contestants = contestants
        self.quick = quick
        self.comparison = Comparison()
        self.versions: dict[str, str] = {}  # of servers
        self._watchdog = GroupWatchdog()
        self._watchdog_of_servers = Watchdog()
        self._stores: dict[str, Store] = {}

    def install(self, console: Console) -> None:
        """Install all contestants; one that cannot be installed does not take part."""
        for one in list(self.contestants):
            console.print(f"{one.name}: installing", style="dim")
            try:
                one.install()
                self._store(one)
            except (Failed, ServerMissing, ServerFailed) as error:
                self.contestants.remove(one)
                self.comparison.failures[one.name, "install"] = str(error)

    def run(self, one: Contestant, workload: str) -> str | None:
        """Measure a workload once and return its figures as text; None if it has failed before."""
        if (one.name, workload) in self.comparison.failures:
            return None
        try:
            values = self._measure(one, workload)
        except Exception as error:  # any error is reported, and the others go on
            text = str(error) if isinstance(error, Failed) else repr(error)
            self.comparison.failures[one.name, workload] = text
            return f"FAILED: {text}"
        if values is None:
            return None
        self.comparison.values[one.name, workload].append(values)
        shown = (f"{v:,.1f} {unit}" for v, (_, unit) in zip(values, parts(workload), strict=True))
        return ", ".join(shown)

    def close(self) -> None:
        """End the servers."""
        for store in self._stores.values():
            store.close()
        self._watchdog.close()
        self._watchdog_of_servers.close()

    def _store(self, one: Contestant) -> Store:
        if one.store not in self._stores:
            store = self._stores[one.store] = _STORES[one.store](self._watchdog_of_servers)
            self.versions |= store.versions()
        return self._stores[one.store]

    def _measure(self, one: Contestant, workload: str) -> Values | None:
        if workload == "roundtrip":
            return self._round_trip(one)
        if workload in SENDING:
            return self._send(one, workload)
        return self._drain(one, workload)

    def _drain(self, one: Contestant, workload: str) -> Values | None:
        if workload not in one.counts:
            return None
        count = one.counts[workload]
        if self.quick:
            count = min(count, QUICK_DRAIN)
        done = drains.measure(one, self._store(one), workload, count, self._watchdog)
        self.comparison.settled[one.name, workload].append(done.settling)
        return (
            done.rate,
            done.worker_cpu / done.tasks * 1e6,
            done.server_cpu / done.tasks * 1e6,
            done.memory / 1e6,
        )

    def _send(self, one: Contestant, workload: str) -> Values | None:
        store = self._store(one)
        drains.make_room(one, store, self._watchdog)
        count = QUICK_SENT if self.quick else SENT
        words = [workload, *([str(CALLERS)] if workload == "enqueue" else []), str(count)]
        answer = ask(one, self._watchdog, ASK_TIMEOUT, *words, **store.variables())
        return None if "unsupported" in answer else (count / answer["seconds"],)

    def _round_trip(self, one: Contestant) -> Values | None:
        if not one.results:
            return None
        store = self._store(one)
        drains.make_room(one, store, self._watchdog)
        count = QUICK_TRIPS if self.quick else TRIPS
        with worker_of(one, "noop", self._watchdog, **store.variables()):
            words = ("roundtrip", str(count))
            answer = ask(one, self._watchdog, ASK_TIMEOUT, *words, **store.variables())
        # The first ones include waiting for the worker and connecting.
        taken = sorted(answer["milliseconds"][count // 10 :])
        return statistics.median(taken), taken[len(taken) * 99 // 100]


# --- output ---


def show(comparison: Comparison, chosen: list[Contestant], workload: str, console: Console) -> None:
    """Print the table of a workload, the fastest first."""
    rows = {
        one.name: comparison.values[one.name, workload]
        for one in chosen
        if comparison.values.get((one.name, workload))
    }
    failed = {one.name for one in chosen if (one.name, workload) in comparison.failures}
    if not rows and not failed:
        return
    names = parts(workload)
    table = Table(title=f"{workload}: {TITLES[workload]}")
    table.add_column("who", no_wrap=True)
    for column in (f"{names[0][0]}, {names[0][1]}", "least", "greatest", "aiotaskq: times as fast"):
        table.add_column(column, justify="right")
    for name, unit in names[1:]:
        table.add_column(f"{name}, {unit}", justify="right")
    less_is_better = workload == "roundtrip"
    medians = {who: statistics.median(run[0] for run in runs) for who, runs in rows.items()}
    without = {one.name for one in chosen if not one.results}
    beside = {who: medians[one] for who, one in references(chosen).items() if one in medians}
    for who in sorted(rows, key=medians.__getitem__, reverse=not less_is_better):
        label, *cells = _row(who, rows[who], beside.get(who), less_is_better=less_is_better)
        table.add_row(f"{label} (no results)" if who in without else label, *cells)
    for who in sorted(failed - set(rows)):
        table.add_row(who, "failed")
    console.print(table)


def references(chosen: list[Contestant]) -> dict[str, str]:
    """Return the aiotaskq that each contestant is compared with: the first on the same server."""
    ours = {one.store: one.name for one in reversed(chosen) if one.is_ours}
    return {
        one.name: ours[one.store]
        for one in chosen
        if one.store in ours and one.name != ours[one.store]
    }


def _row(who: str, runs: list[Values], ours: float | None, *, less_is_better: bool) -> list[str]:
    first, *others = zip(*runs, strict=True)
    median = statistics.median(first)
    times = ""
    if ours is not None:
        times = f"{median / ours if less_is_better else ours / median:,.1f} x"
    digits = 2 if less_is_better else 0
    numbers = (f"{number:,.{digits}f}" for number in (median, min(first), max(first)))
    rest = (f"{statistics.median(part):,.{max(digits, 1)}f}" for part in others)
    return [who, *numbers, times, *rest]


def tell(comparison: Comparison, chosen: list[Contestant], console: Console) -> None:
    """Print the set-up of each, its guarantees, and the failures."""
    table = Table(title="contestants", show_lines=True)
    for column in ("who", "set-up", "results", "tasks of a killed worker"):
        table.add_column(column)
    for one in chosen:
        stored = "stored" if one.results else "none"
        table.add_row(one.name, escape(one.settings), stored, escape(one.durability))
    console.print(table)
    for (who, workload), error in comparison.failures.items():
        console.print(f"{who}, {workload}: {error}", style="red", markup=False)


def versions(contestants: list[Contestant]) -> dict[str, str]:
    """Return all versions, by name."""
    found = {one.library: one.versions for one in contestants}
    found["python"] = platform.python_version()
    for command in (["redis-server", "--version"], ["node", "--version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue  # not installed: nobody was measured with it
        found[command[0]] = done.stdout.strip()
    return found


def write(sitting: Sitting, chosen: list[Contestant], file: Path) -> None:
    """Write every run as JSON, with settings, guarantees and failures."""
    comparison = sitting.comparison
    Report(list(comparison.figures()), {**versions(chosen), **sitting.versions}).write(file)
    report = json.loads(file.read_text(encoding="utf-8"))
    report["contestants"] = {
        one.name: {
            "settings": one.settings,
            "durability": one.durability,
            "server": one.store,
            "stores_results": bool(one.results),
            "tasks": {} if sitting.quick else one.counts,
            "failures": {w: e for (who, w), e in comparison.failures.items() if who == one.name},
            "seconds_to_settle": {
                w: s for (who, w), s in comparison.settled.items() if who == one.name
            },
        }
        for one in chosen
    }
    file.write_text(json.dumps(report, indent=2), encoding="utf-8")


# --- the command line ---


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        given = text.split(",")
        unknown = set(given) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(
                f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}"
            )
        return given

    return read


def _parse(known: list[Contestant]) -> argparse.Namespace:
    everything = [*workloads.NAMES, *SENDING]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument(
        "--only",
        type=_names([one.name for one in known]),
        help="only these, and aiotaskq on the same servers: taskiq,saq",
    )
    parser.add_argument(
        "--workloads", type=_names(everything), default=everything, help=",".join(everything)
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds [3]")
    parser.add_argument(
        "--quick", action="store_true", help="few tasks and one round, to see whether it works"
    )
    parser.add_argument("--json", type=Path, help="write every run to this file")
    return parser.parse_args()


def choose(known: list[Contestant], names: list[str]) -> list[Contestant]:
    """Return the contestants with these names, and aiotaskq on the servers that they use."""
    servers = {one.store for one in known if one.name in names}
    return [one for one in known if one.name in names or (one.is_ours and one.store in servers)]


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM end this process like Ctrl-C, so that all servers are stopped."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Measure and print."""
    known = find()
    options = _parse(known)
    chosen = known if options.only is None else choose(known, options.only)
    rounds = 1 if options.quick else options.rounds
    console = Console()
    sitting = Sitting(list(chosen), quick=options.quick)
    interrupted = False
    with _ended_in_order():
        try:
            sitting.install(console)
            for number in range(1, rounds + 1):
                _round(sitting, number, options.workloads, console)
        except KeyboardInterrupt:
            interrupted = True  # the figures so far are shown
        finally:
            sitting.close()
    for workload in options.workloads:
        show(sitting.comparison, chosen, workload, console)
    tell(sitting.comparison, chosen, console)
    if options.json:
        write(sitting, chosen, options.json)
    if interrupted:
        sys.exit(128 + signal.SIGINT)


def _round(sitting: Sitting, number: int, chosen: list[str], console: Console) -> None:
    for workload in chosen:
        for one in sitting.contestants:
            said = sitting.run(one, workload)
            if said is not None:
                where = f"round {number}, {workload}, {one.name}"
                console.print(f"{where}: {said}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
