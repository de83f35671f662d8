"""Suspects: tasks that run alone after two crashes, and are dead letters after the last one."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import pytest
from msgspec import Raw

from aiotaskq import ConfigError, TaskQueue, TaskStatus, current_task
from aiotaskq.contract.message import SUSPECT
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.settlement import Release
from aiotaskq.drivers.memory import MemoryBackend
from aiotaskq.events import Started, Succeeded
from aiotaskq.worker.quarantine import Quarantine
from tests.worker.events import LONG, EventRecorder, until
from tests.worker.outage import Outage, OutageBroker


async def _kill(app: TaskQueue, times: int) -> None:
    """Let consumers take the waiting messages and die, one after another."""
    broker = await app.broker()
    for number in range(times):
        consumer = broker.consumer(["default"], name=f"victim-{number}", lease=60)
        await consumer.open()
        while await consumer.fetch(100, 0):
            pass
        lease = broker.lease(consumer.grant)
        await lease.end(f"victim-{number} was shot")
        await lease.close()
        await consumer.close()


async def test_a_suspect_runs_alone_on_a_busy_worker(app: TaskQueue) -> None:
    beside: list[set[str]] = []
    running: set[str] = set()

    @app.task
    async def job(name: str) -> str:
        running.add(name)
        await asyncio.sleep(0.05)
        if name == "suspect":
            beside.append(running - {name})
        running.discard(name)
        return name

    suspect = await job.kiq("suspect")
    await _kill(app, SUSPECT)
    others = [await job.kiq(f"other-{number}") for number in range(40)]
    async with app.worker(concurrency=4):
        assert await suspect.result(LONG) == "suspect"
        for other in others:
            await other.result(LONG)
    assert beside == [set()]


async def test_a_busy_worker_makes_room_for_a_suspect(app: TaskQueue) -> None:
    recorded = EventRecorder(app, Started)
    stop = asyncio.Event()

    @app.task
    async def busy() -> None:
        await asyncio.sleep(0.01)
        if not stop.is_set():
            await busy.kiq()

    @app.task
    async def suspect() -> str:
        return current_task().id

    handle = await suspect.kiq()
    await _kill(app, SUSPECT)
    broker = await app.broker()
    holder = broker.consumer(["default"], name="holder", lease=60)
    await holder.open()
    [held] = await holder.fetch(1, LONG)
    async with app.worker(concurrency=8):
        for _ in range(8):
            await busy.kiq()
        await recorded.count(20)
        await holder.settle([Release(held)])
        await holder.close()
        assert await handle.result(LONG) == handle.id
        await recorded.count(len(recorded.events) + 20)  # and the others go on
        stop.set()


async def test_after_max_crashes_a_message_is_a_dead_letter_with_details(app: TaskQueue) -> None:
    @app.task
    async def job() -> None:
        raise AssertionError("it must not run")

    handle = await job.kiq()
    await _kill(app, 3)
    async with app.worker():
        outcome = await handle.wait(LONG)
    assert outcome.status is TaskStatus.FAILURE
    assert "3 workers died while running it; the last: " in str(outcome.error)
    assert "victim-2 was shot" in str(outcome.error)
    [letter] = await (await app.broker()).dead("default")
    assert letter.crashes == 3
    assert "victim-2 was shot" in letter.reason
    assert b'"task":' in letter.details


def test_quarantine_is_quiet_for_a_while_and_longer_the_next_time() -> None:
    now = 0.0
    quarantine = Quarantine(clock=lambda: now)
    assert not quarantine.quiet
    spells: list[float] = []
    quarantine.note(suspects=True)
    began: float | None = None
    while len(spells) < 3:
        now += 0.1
        quarantine.note(suspects=True)
        if quarantine.quiet:
            began = now if began is None else began
        elif began is not None:
            spells.append(now - began)
            began = None
    assert [round(spell / 30) for spell in spells] == [1, 2, 4]
    quarantine.note(suspects=False)
    assert not quarantine.quiet


async def test_a_task_whose_outcome_is_stored_does_not_run_again_after_a_crash(
    app: TaskQueue,
) -> None:
    runs: list[str] = []

    @app.task
    async def job(name: str) -> str:
        runs.append(name)
        return name

    told, untold = await job.kiq("told"), await job.kiq("untold")
    backend = await app.backend()
    assert backend is not None
    done = Outcome(task_id=told.id, status=TaskStatus.SUCCESS, result=Raw(b'"before"'))
    assert not await backend.store([done], None)
    await _kill(app, 1)
    async with app.worker():
        assert await untold.result(LONG) == "untold"
        assert await told.result(LONG) == "before"
    assert runs == ["untold"]
    assert await (await app.broker()).depth() == {}


async def test_a_failing_result_store_does_not_keep_tasks_from_running_again(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task
    async def job() -> str:
        monkeypatch.undo()  # otherwise its result could not be read
        return "ran"

    async def fail(self: MemoryBackend, ids: Collection[str]) -> Mapping[str, Outcome]:
        raise ConfigError("somebody has changed the password")

    handle = await job.kiq()
    await _kill(app, 1)
    monkeypatch.setattr(MemoryBackend, "load", fail)
    async with app.worker():
        await until(lambda: MemoryBackend.load is not fail)
        assert await handle.result(LONG) == "ran"


async def test_a_suspect_is_alone_until_it_is_settled() -> None:
    """A worker may die while it stores the result, and must hold no other task then."""
    outage = Outage()
    app = TaskQueue("flaky", broker=OutageBroker(outage))
    recorded = EventRecorder(app, Succeeded)

    @app.task
    async def job() -> None:
        outage.backend_down = not recorded.events  # while the first one ends

    await job.kiq()
    await _kill(app, SUSPECT)
    await job.kiq()
    async with app.worker(concurrency=2):
        await recorded.count(1)
        await asyncio.sleep(0.3)  # time for another fetch
        assert (await (await app.broker()).depth())["default"].ready == 1
        outage.backend_down = False
        await recorded.count(2)
    await app.close()
