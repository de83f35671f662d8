"""The fuzzer: makes attacks on a store, and checks after each that good tasks end well."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aiotaskq.app import TaskQueue
from aiotaskq.contract.message import Envelope
from aiotaskq.recurrence import every
from aiotaskq.testing.fuzz.seeds import TASK, bodies

PATIENCE = 30.0
"""Seconds in which good tasks have to end after an attack."""

_TICK = "fuzz.tick"
_GOOD = 3  # tasks after each attack, beside a delayed one
_TICKS = 2  # runs of the schedule after the last attack
_SHOWN = 20  # ids that are given to a command
_MODULE = """\
from aiotaskq import TaskQueue

app = TaskQueue("fuzz", broker={url!r})
app.task(name={task!r})(lambda x: x)
"""


class Attack(NamedTuple):
    """One hostile entry.

    Attributes:
        name: The entry, for the report.
        make: Writes it. A plain function is called in a thread.
    """

    name: str
    make: Callable[[], Any]


def body_attacks(
    publish: Callable[[Sequence[Envelope]], Awaitable[Any]], seed: int
) -> list[Attack]:
    """Return attacks by messages, which work with every driver.

    Args:
        publish: Stores envelopes, such as `Broker.publish`.
        seed: Of the random bodies.
    """

    def attack(number: int, body: bytes) -> Attack:
        async def make() -> None:
            await publish([Envelope(id=f"hostile-{number}", queue="default", body=body)])

        return Attack(f"the body {body[:60]!r} of {len(body):,} bytes", make)

    return [attack(number, body) for number, body in enumerate(bodies(random.Random(seed)))]


async def fuzz(url: str, attacks: Sequence[Attack], *, seconds: float, seed: int) -> int:
    """Make attacks in a random order for some seconds; return how many were made.

    Args:
        url: The store, for messages, results and schedules.
        attacks: The attacks.
        seconds: The time for all of them. Each is made once at least, if there is time.
        seed: Of their order.

    Raises:
        AssertionError: Good tasks did not end after an attack; it is named, with the seed.
    """
    app = TaskQueue("fuzz", broker=url)
    app.conf.update(unknown_task_ttl=0.1, max_crashes=100)
    ticks = asyncio.Semaphore(0)

    @app.task(name=TASK)
    async def good(x: int) -> int:
        return x

    @app.task(name=_TICK, ignore_result=True)
    async def tick() -> None:
        ticks.release()

    made: list[str] = []
    order = list(attacks)
    random.Random(seed).shuffle(order)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app)
        scheduled = (await app.broker()).traits.schedules
        if scheduled:
            app.conf.beat_schedule = {"tick": {"task": _TICK, "schedule": 0.25}}
            await stack.enter_async_context(app.scheduler())
        await stack.enter_async_context(app.worker(concurrency=10))
        await _run_good(good, 0)
        end = time.monotonic() + seconds
        for attack in order:
            if time.monotonic() >= end:
                break
            made.append(attack.name)
            with _report("good tasks", made, seed):
                await _make(attack)
                await _run_good(good, len(made))
        if scheduled:  # a new one: an attack may have removed the others
            with _report("the runs of a schedule", made, seed):
                await app.schedules.add(f"fresh {seed}", _TICK, every(0.25))
                await _wait_for(ticks)
    return len(made)


@contextmanager
def _report(what: str, made: Sequence[str], seed: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        last = "; ".join(made[-3:])
        raise AssertionError(
            f"{what} did not end well (seed {seed}): {error!r}; the last attacks: {last}"
        ) from error


async def _make(attack: Attack) -> None:
    if asyncio.iscoroutinefunction(attack.make):
        await attack.make()
    else:
        await asyncio.to_thread(attack.make)


async def _wait_for(ticks: asyncio.Semaphore) -> None:
    async with asyncio.timeout(PATIENCE):
        while not ticks.locked():  # the runs of before do not count
            await ticks.acquire()
        for _ in range(_TICKS):
            await ticks.acquire()


async def _run_good(good: Any, number: int) -> None:
    """Run good tasks to their end, one of them delayed."""
    async with asyncio.timeout(PATIENCE):
        handles = await asyncio.gather(*(good.kiq(number + n) for n in range(_GOOD)))
        handles.append(await good.with_options(countdown=0.01).kiq(number + _GOOD))
        values = [await handle.result(timeout=PATIENCE) for handle in handles]
    assert values == [number + n for n in range(_GOOD + 1)]


def check_dead_commands(url: str, folder: Path) -> None:
    """Check that the commands about dead letters work, each in a process of its own.

    Args:
        url: The store.
        folder: An empty folder, for a module with an application.

    Raises:
        AssertionError: One of them failed, or printed something else than JSON.
    """
    (folder / "fuzzed.py").write_text(_MODULE.format(url=url, task=TASK), encoding="utf-8")

    def run(*words: str) -> Any:
        command = [sys.executable, "-m", "aiotaskq", "dead", *words]
        path = os.pathsep.join([str(folder), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=120, check=False
        )
        output = done.stdout.decode(errors="replace")
        assert done.returncode == 0, f"{words} failed: {output[-2000:]} {done.stderr[-2000:]!r}"
        return json.loads(output)

    listed = run("list", "fuzzed:app", "--json", "--limit", "1000")
    ids = [one["id"] for one in listed if one["id"].isprintable() and one["id"][:1].isalnum()]
    if ids:
        shown = run("show", "fuzzed:app", *dict.fromkeys(ids[:_SHOWN]), "--json")
        assert {one["id"] for one in shown} == set(ids[:_SHOWN])
        assert run("retry", "fuzzed:app", ids[0], "--json")["retried"] >= 1
    if listed:
        run("discard", "fuzzed:app", "--all", "--json")
        assert run("list", "fuzzed:app", "--json") == []
