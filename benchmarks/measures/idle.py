"""Cost of an idle worker: CPU time, and commands to the server.

``aiotaskq worker`` with one process is watched several times for ten seconds, some seconds after
its start. The CPU time is that of the whole program: the supervisor, the keeper, and the worker.
The commands are those that reach the Redis server over connections, as its MONITOR shows them.
Commands that scripts run inside the server are a separate figure. A worker on an SQLite file is
watched at the same time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.client import Monitor

from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import Bench, cpu_seconds
from tests.faults.fleet import Program

CORE = Target(0.5, most=True)  # percent of a core
COMMANDS = Target(10, most=True)  # a second
_MARK = "a look"


@dataclass(frozen=True)
class Window:
    """CPU time and commands within some time.

    Attributes:
        seconds: The duration.
        cpu: CPU seconds of all processes of a program, by the name of its store.
        sent: The number of commands over connections, by command.
        inside: The number of commands in scripts.
    """

    seconds: float
    cpu: Mapping[str, float]
    sent: Counter[str] = field(default_factory=Counter)
    inside: int = 0


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield percent of a core, and commands per second."""
    redis, sqlite = bench.redis(), bench.sqlite()
    with bench.worker(redis) as on_redis, bench.worker(sqlite) as on_sqlite:
        time.sleep(bench.size(5.0, 0.5))
        pids = {redis.name: pids_of(on_redis), sqlite.name: pids_of(on_sqlite)}
        windows = watch(bench, pids, bench.size(10.0, 1.5), bench.runs(3))
    for name in pids:
        shares = [100 * window.cpu[name] / window.seconds for window in windows]
        target = CORE if name == redis.name else None
        yield Figure(f"idle worker, {name}: CPU", "% of a core", shares, target=target)
    rates = [window.sent.total() / window.seconds for window in windows]
    note = _note(windows)
    yield Figure("idle worker: commands to Redis", "1/s", rates, target=COMMANDS, note=note)
    rates = [window.inside / window.seconds for window in windows]
    yield Figure("idle worker: commands in scripts", "1/s", rates)


def watch(
    bench: Bench, pids: Mapping[str, Sequence[int]], seconds: float, count: int
) -> list[Window]:
    """Watch the Redis server and some programs, given by name, several times."""
    windows = []
    with bench.redis_client.monitor() as monitor:  # type: ignore[no-untyped-call]  # redis-py has no types here
        _read(bench, monitor)  # what came before
        for _ in range(count):
            started, before = time.perf_counter(), _cpu(pids)
            time.sleep(seconds)
            after = _cpu(pids)
            taken = time.perf_counter() - started
            sent, inside = _read(bench, monitor)
            cpu = {name: after[name] - before[name] for name in pids}
            windows.append(Window(taken, cpu, sent, inside))
    return windows


def _read(bench: Bench, monitor: Monitor) -> tuple[Counter[str], int]:
    """Return the commands over connections, and the number in scripts, since the last call."""
    bench.redis_client.echo(_MARK)
    sent: Counter[str] = Counter()
    inside = 0
    while True:
        # redis-py has no types here.
        seen: Any = monitor.next_command()  # type: ignore[no-untyped-call]
        if seen["client_type"] == "lua":
            inside += 1
        elif seen["command"].endswith(_MARK):
            return sent, inside
        else:
            sent[seen["command"].split()[0]] += 1


def _note(windows: list[Window]) -> str:
    calls = sum((window.sent for window in windows), Counter[str]())
    seconds = sum(window.seconds for window in windows)
    return ", ".join(f"{name} {number / seconds:.1f}" for name, number in calls.most_common())


def _cpu(pids: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {name: cpu_seconds(*each) for name, each in pids.items()}


def pids_of(program: Program) -> list[int]:
    """Return all processes of a program."""
    return [process.pid for process in program.family()]
