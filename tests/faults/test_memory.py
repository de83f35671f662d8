"""Embedded workers over the memory broker, which die and are replaced."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aiotaskq import TaskQueue, Worker
from tests.faults import application
from tests.faults.checker import Facts, Verdict, check
from tests.faults.ledger import Acknowledged, Attempted, Fault, Ledger, Started, Writer
from tests.faults.observer import Observer
from tests.faults.scene import BEAT, LEASE, PATIENCE, scaled

pytestmark = pytest.mark.may_block("its tasks write into the ledger")

NAMES = {name.rpartition(".")[2]: name for name in application.app.tasks}


class Stage:
    """An application with a memory broker of its own, and the usual tasks."""

    def __init__(self, folder: Path) -> None:
        self.app = TaskQueue(
            "memory",
            broker="memory://",
            worker_lease=LEASE,
            worker_heartbeat=BEAT,
            max_crashes=50,
            task_cancel_grace=0.5,
        )
        self.app.tasks.update(application.app.tasks)
        self.ledger = Ledger(folder)
        self.writer = Writer(folder, "stage")
        self.observer = Observer(self.app, self.ledger, self.writer)
        self._sent = 0

    async def send(self, task: str, **values: object) -> None:
        key = f"m-{self._sent}"
        self._sent += 1
        self.writer.write(Attempted(key=key, task=task))
        handle = await self.app.send(NAMES[task], (), {"key": key, **values})
        self.writer.write(Acknowledged(key=key, task_id=handle.id))

    def start(self, **options: float) -> tuple[Worker, asyncio.Task[None]]:
        worker = self.app.worker(concurrency=20, **options)  # type: ignore[arg-type]
        return worker, asyncio.create_task(worker.run())

    async def verdict(self) -> Verdict:
        wanted = {line.task_id for line in self.ledger.of(Acknowledged)}
        drained = await self.observer.drained(wanted, PATIENCE)
        return check(
            Facts(
                lines=self.ledger.refresh(),
                lease=LEASE,
                outcomes=await self.observer.finals(self.app),
                letters=await self.observer.letters(),
                waiting=await self.observer.waiting(),
                drained=drained,
            )
        )


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    monkeypatch.setattr(application, "ledger", Writer(tmp_path, "worker"))
    monkeypatch.setattr(application, "FOLDER", tmp_path)
    stage = Stage(tmp_path)
    await stage.observer.open()
    yield stage
    await stage.observer.close()
    await stage.app.close()


async def test_t01_embedded_workers_are_cancelled_in_the_middle_of_tasks(
    stage: Stage, chance: random.Random
) -> None:
    workers = [stage.start()[1] for _ in range(3)]
    for number in range(scaled(6, 100)):
        for _ in range(20):
            await stage.send("quick", seconds=chance.uniform(0.0, 0.3))
        await stage.send("flaky", failures=1)
        await stage.send("thread", seconds=0.05)
        await asyncio.sleep(chance.uniform(0.05, 0.3))
        victim = workers.pop(number % 3)
        now = time.monotonic()
        stage.writer.write(Fault(at=now, kind="cancelled", until=now + 1.0))
        victim.cancel()
        workers.append(stage.start()[1])
    verdict = await stage.verdict()
    for worker in workers:
        worker.cancel()
    await asyncio.wait(workers)
    assert not verdict.problems, str(verdict)


async def test_t05_t06_what_outlasts_the_grace_period_goes_to_another_worker(
    stage: Stage,
) -> None:
    first, running = stage.start(grace_period=0.5)
    for _ in range(5):
        await stage.send("again", seconds=600)
        await stage.send("quick", seconds=0.2)
    await stage.ledger.count(Started, 10, within=PATIENCE)
    now = time.monotonic()
    stage.writer.write(Fault(at=now, kind="stopped", until=now + 0.5))
    first.stop()
    await running
    second, running = stage.start()
    verdict = await stage.verdict()
    second.stop()
    await running
    assert not verdict.problems, str(verdict)
    assert verdict.counts["second runs"] == 5


async def test_t14_t15_what_a_task_does_to_itself_is_its_own_failure(stage: Stage) -> None:
    worker, running = stage.start()
    for what in ("unencodable", "huge", "raise-hostile", "raise-exit", "raise-local"):
        await stage.send("hostile", what=what)
    await stage.send("swallower", seconds=2.0)
    for _ in range(20):
        await stage.send("quick")
    verdict = await stage.verdict()
    worker.stop()
    await running
    assert not verdict.problems, str(verdict)
    assert verdict.counts["failed"] == 6
