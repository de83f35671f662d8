"""The monitor of the event loop, on a loop that is really blocked."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from aiotaskq.events import LoopBlocked, Observers
from aiotaskq.worker.loop_monitor import LoopMonitor

pytestmark = pytest.mark.may_block(reason="blocks are what is tested")

WARN_AFTER = 0.2
PATIENCE = 120.0


class Watched:
    """A monitor, with its reports."""

    def __init__(self, warn_after: float | None = WARN_AFTER) -> None:
        self.events: list[LoopBlocked] = []
        self.heard = threading.Event()
        self.blocks = 0
        observers = Observers()
        observers.add(LoopBlocked, self._note)
        self.guard = LoopMonitor(
            warn_after,
            observers=observers,
            worker="w1",
            describe=lambda task: "" if task is None else f"<{task.get_name()}>",
            blocked=self._count,
        )

    def _note(self, event: LoopBlocked) -> None:
        self.events.append(event)
        self.heard.set()

    def _count(self) -> None:
        self.blocks += 1


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    made = Watched()
    yield made
    await made.guard.stop()


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.01)


async def named(name: str, work: Awaitable[None]) -> None:
    async def run() -> None:
        await work

    await asyncio.create_task(run(), name=name)


async def culprit(watched: Watched) -> None:
    """Block the loop until the monitor has reported it."""
    assert watched.heard.wait(PATIENCE)


async def test_a_block_is_reported_while_it_lasts_with_its_stack_and_its_task(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.guard.start()
    await named("guilty", culprit(watched))
    [event] = watched.events
    assert event.worker == "w1"
    assert event.task == "<guilty>"
    assert event.seconds >= WARN_AFTER
    assert "in culprit" in event.stack
    assert event.stack.index("in run") < event.stack.index(
        "in culprit"
    )  # the innermost frame is the last one
    await until(lambda: "runs again" in caplog.text)
    warning, over = caplog.records
    assert warning.levelno == over.levelno == logging.WARNING
    assert "the event loop of w1 has not run for" in warning.getMessage()
    assert "held by <guilty>" in warning.getMessage()
    assert "in culprit" in warning.getMessage()
    assert watched.blocks == 1


async def test_each_block_is_reported_once(watched: Watched) -> None:
    watched.guard.start()
    for count in (1, 2):
        watched.heard.clear()
        await culprit(watched)
        time.sleep(3 * WARN_AFTER)  # the block goes on
        assert watched.blocks == count
        await asyncio.sleep(2 * WARN_AFTER)
    assert len(watched.events) == 2


async def test_a_running_loop_is_not_reported(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.guard.start()
    await asyncio.sleep(4 * WARN_AFTER)
    # A busy machine may stop the whole process for a while, which is rightly reported.
    if watched.guard.take_worst() < WARN_AFTER / 2:
        assert watched.events == []
        assert caplog.records == []


async def test_lag_grows_while_the_loop_is_blocked(watched: Watched) -> None:
    watched.guard.start()
    assert watched.guard.lag < PATIENCE
    await culprit(watched)
    assert watched.guard.lag > 0  # the loop has not run since then
    await until(lambda: watched.guard.lag == 0)
    worst = watched.guard.take_worst()
    assert worst >= WARN_AFTER / 2
    assert watched.guard.take_worst() < worst


async def test_a_blocked_thread_is_not_reported(watched: Watched) -> None:
    watched.guard.start()
    await asyncio.to_thread(time.sleep, 3 * WARN_AFTER)
    assert all("time.sleep" not in event.stack for event in watched.events)


async def test_without_a_limit_there_is_no_thread() -> None:
    watched = Watched(None)
    threads = threading.active_count()
    watched.guard.start()
    assert threading.active_count() == threads
    assert watched.guard.lag == watched.guard.take_worst() == 0
    await watched.guard.stop()


async def test_the_monitor_stops_while_an_observer_hangs() -> None:
    release = threading.Event()
    inside = threading.Event()

    def hang(event: LoopBlocked) -> None:
        inside.set()
        release.wait(PATIENCE)

    observers = Observers()
    observers.add(LoopBlocked, hang)
    guard = LoopMonitor(WARN_AFTER, observers=observers, worker="w", describe=lambda task: "")
    guard.start()
    assert inside.wait(PATIENCE)
    await guard.stop()
    assert not release.is_set()
    release.set()


async def test_the_monitor_may_be_stopped_twice_and_without_a_start(watched: Watched) -> None:
    await watched.guard.stop()
    watched.guard.start()
    await watched.guard.stop()
    await watched.guard.stop()


async def test_a_description_that_fails_does_not_end_the_monitor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(task: asyncio.Task[Any] | None) -> str:
        raise LookupError("no such run")

    told = threading.Event()
    observers = Observers()
    observers.add(LoopBlocked, lambda event: told.set())
    guard = LoopMonitor(WARN_AFTER, observers=observers, worker="w", describe=fail)
    guard.start()
    assert told.wait(PATIENCE)
    await guard.stop()
    assert "no such run" in caplog.text


PROGRAM = """\
import asyncio, logging, sys
from aiotaskq.events import Observers
from aiotaskq.worker.loop_monitor import LoopMonitor

async def main():
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    guard = LoopMonitor(0.3, observers=Observers(), worker="w", describe=repr)
    guard.start()
    await asyncio.sleep(0.1)
    {block}
    await asyncio.sleep({rest})
    await guard.stop()

asyncio.run(main())
"""


def test_code_that_holds_the_gil_is_reported_afterwards() -> None:
    held = PROGRAM.format(block="sum(range(10**8))", rest=0.5)
    done = subprocess.run(
        [sys.executable, "-c", held], capture_output=True, text=True, timeout=280, check=True
    )
    assert "C code held the interpreter's lock" in done.stdout, done.stdout
