"""Tables and plots of the documents, from the results of the benchmarks.

``python -m benchmarks.report`` draws the plots (needs matplotlib).
``python -m tests.examples.documents`` updates the tables. Both read the folder `RESULTS`, which
``make bench``, ``make bench-compare`` and ``make bench-brokers`` write.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.figures import Target

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
OURS = "aiotaskq"
DRAINS = ("noop", "sync", "sleep", "cpu", "payload")
ALL = (*DRAINS, "enqueue", "bulk", "roundtrip")
BROKERS = ("postgres", "rabbitmq")  # each has its own file of results


class Line(msgspec.Struct, frozen=True):
    """One figure in a file of results."""

    measure: str
    unit: str
    runs: tuple[float, ...]
    who: str
    target: Target | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return median(self.runs)


class Contestant(msgspec.Struct, frozen=True):
    """One contestant in a file of results."""

    settings: str
    durability: str
    stores_results: bool
    server: str = "redis"  # files of earlier versions have no server


class Written(msgspec.Struct, frozen=True):
    """A file of results."""

    version: str
    at: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    figures: Sequence[Line]
    contestants: Mapping[str, Contestant] = {}

    def of(self, measure: str) -> dict[str, Line]:
        """Return the figures of one measure, by contestant."""
        return {one.who: one for one in self.figures if one.measure == measure}


def read(name: str) -> Written:
    """Read a file of results."""
    return msgspec.json.decode((RESULTS / f"{name}.json").read_bytes(), type=Written)


# --- tables ---


def targets_table() -> str:
    """Return the figures of aiotaskq, with their targets."""
    rows = []
    soaked = _is_measured("soak")  # it takes long, and is not part of every session
    for name in ("own", "soak") if soaked else ("own",):
        for one in read(name).figures:
            verdict = "" if one.target is None else f"{one.target} {one.unit}".strip()
            met = "" if one.target is None else "yes" if one.target.met(one.median) else "**no**"
            spread = f"{_short(min(one.runs))} to {_short(max(one.runs))}"
            value = f"{_short(one.median)} {one.unit}"
            rows.append((one.measure, value, spread if len(one.runs) > 1 else "", verdict, met))
    return _table(("measure", "median", "runs", "target", "met"), rows)


def ratios_table() -> str:
    """Return the ratios of aiotaskq to the best of the others."""
    told = read("compare")
    rows = [
        _ratio(told, "noop: rate", "drain", 20.0, _python_rivals(told)),
        _ratio(told, "noop: rate", "drain", 2.0, {"bullmq"}),
        _ratio(told, "enqueue: rate", "one by one from 100 callers", 5.0, {"taskiq"}),
        _ratio(told, "bulk: rate", "in batches of 1,000", None, _others(told)),
        _ratio(told, "roundtrip: p50", "round trip", 3.0, _others(told), less=True),
    ]
    return _table(("measure", OURS, "beside", "times as good", "target", "met"), rows)


def _others(told: Written) -> set[str]:
    return {name for name in told.contestants if not _is_ours(name)}


def _is_ours(name: str) -> bool:
    return name == OURS or name.startswith(f"{OURS}-")


def _python_rivals(told: Written) -> set[str]:
    """Return the Python libraries on Redis that store results."""
    return {
        name
        for name in _others(told) - {"bullmq"}
        if told.contestants[name].stores_results and told.contestants[name].server == "redis"
    }


def _ratio(
    told: Written,
    measure: str,
    what: str,
    target: float | None,
    names: set[str],
    *,
    less: bool = False,
) -> tuple[str, ...]:
    found = told.of(measure)
    ours = found[OURS].median
    others = {who: one.median for who, one in found.items() if who in names}
    best = (min if less else max)(others, key=others.__getitem__)
    times = others[best] / ours if less else ours / others[best]
    unit = found[OURS].unit
    goal = "" if target is None else f"≥ {target:g}"
    met = "" if target is None else "yes" if times >= target else "**no**"
    return (
        what,
        f"{_short(ours)} {unit}",
        f"{best}: {_short(others[best])}",
        f"{times:.1f}",
        goal,
        met,
    )


def rivals_table() -> str:
    """Return the rates of all contestants under every load."""
    told = read("compare")
    loads = _measured(told)
    found = list(loads.values())
    names = sorted(told.contestants, key=lambda who: -_or_zero(found[0].get(who)))
    rows = [
        (
            who if told.contestants[who].stores_results else f"{who} (no results)",
            *(_short(one[who].median) if who in one else "" for one in found),
        )
        for who in names
    ]
    heads = [f"{name}, {'ms' if name == 'roundtrip' else 'tasks/s'}" for name in loads]
    return _table(("", *heads), rows)


def _measured(told: Written) -> dict[str, dict[str, Line]]:
    """Return the compared figure of each load."""
    loads = {name: told.of(f"{name}: {'p50' if name == 'roundtrip' else 'rate'}") for name in ALL}
    return {name: found for name, found in loads.items() if found}


def costs_table() -> str:
    """Return the cost of a no-op task for each contestant."""
    told = read("compare")
    parts = ("worker CPU", "server CPU", "peak memory")
    found = [told.of(f"noop: {part}") for part in parts]
    names = sorted(found[0], key=lambda who: found[0][who].median)
    rows = [(who, *(_short(one[who].median) for one in found)) for who in names]
    return _table(("", "worker CPU, µs/task", "server CPU, µs/task", "peak memory, MB"), rows)


def postgres_table() -> str:
    """Return the drains from PostgreSQL."""
    return _broker_table("postgres", {})


def rabbitmq_table() -> str:
    """Return the drains from RabbitMQ."""
    return _broker_table("rabbitmq", {"taskiq-aio-pika": 3.0})


def _broker_table(server: str, targets: Mapping[str, float]) -> str:
    """Return the drains of one server, the fastest first, with ratios to the first aiotaskq."""
    name = _of_broker(server)
    if not _is_measured(name):
        return _table(("not measured yet",), [("`make bench-brokers` measures it",)])
    told = read(name)
    found = [
        told.of(f"noop: {part}") for part in ("rate", "worker CPU", "server CPU", "peak memory")
    ]
    rates = found[0]
    ours = next(who for who in told.contestants if _is_ours(who) and who in rates)
    rows = []
    for who in sorted(rates, key=lambda one: -rates[one].median):
        times = rates[ours].median / rates[who].median
        target = targets.get(who)
        rows.append(
            (
                who if told.contestants[who].stores_results else f"{who} (no results)",
                *(_short(one[who].median) for one in found),
                "" if who == ours else f"{times:.1f}",
                "" if target is None else f"≥ {target:g}",
                "" if target is None else "yes" if times >= target else "**no**",
            )
        )
    heads = ("", "tasks/s", "worker CPU, µs/task", "server CPU, µs/task", "peak memory, MB")
    return _table((*heads, f"times as fast: {ours}", "target", "met"), rows)


def _of_broker(server: str) -> str:
    return f"compare-{server}"


def _is_measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def promises_table() -> str:
    """Return the set-up of each contestant, and the fate of the tasks of a killed worker."""
    told = read("compare")
    rows = [(who, one.settings, one.durability) for who, one in sorted(told.contestants.items())]
    return _table(("", "set-up", "tasks of a killed worker"), rows)


def machine_table() -> str:
    """Return the machine and the versions of all software."""
    own, told = read("own"), read("compare")
    rows = [(name, text) for name, text in own.machine.items()]
    brokers = {one: read(_of_broker(one)) for one in BROKERS if _is_measured(_of_broker(one))}
    times = [f"rivals {told.at}", *(f"{name} {one.at}" for name, one in brokers.items())]
    rows.append(("measured", ", ".join([own.at, *times])))
    versions = {**own.versions, **told.versions}
    for one in brokers.values():
        versions |= one.versions
    rows += [(name, text) for name, text in versions.items() if text]
    return _table(("", ""), rows)


TABLES = {
    "performance": targets_table,
    "performance_ratios": ratios_table,
    "performance_rivals": rivals_table,
    "performance_costs": costs_table,
    "performance_postgres": postgres_table,
    "performance_rabbitmq": rabbitmq_table,
    "performance_promises": promises_table,
    "performance_machine": machine_table,
}


def _or_zero(line: Line | None) -> float:
    return 0.0 if line is None else line.median


def _short(number: float) -> str:
    """Return a number with three significant digits, or all digits before the point."""
    if abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# --- plots ---


def draw() -> None:
    """Draw a plot of each load."""
    # Imported here, and by name: the tables and the type checkers do not need it.
    mpl: Any = importlib.import_module("matplotlib")
    mpl.use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    mpl.rcParams["svg.hashsalt"] = "aiotaskq"  # so that the same figures give the same file
    told = read("compare")
    IMAGES.mkdir(exist_ok=True)
    for name, found in _measured(told).items():
        unit = "ms, less is better" if name == "roundtrip" else "tasks/s"
        names = sorted(found, key=lambda who: found[who].median, reverse=name == "roundtrip")
        values = [found[who].median for who in names]
        low = [found[who].median - min(found[who].runs) for who in names]
        high = [max(found[who].runs) - found[who].median for who in names]
        figure, axes = plt.subplots(figsize=(7, 0.4 * len(names) + 1))
        colors = ["#1f77b4" if who == OURS else "#b0b0b0" for who in names]
        axes.barh(names, values, color=colors, xerr=[low, high], capsize=2)
        axes.set_xlabel(unit)
        axes.set_title(name)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(IMAGES / f"performance-{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw()
