"""Outages and lost leases: blocked event loops, and servers that are away for a while."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Collection, Coroutine, Sequence
from typing import Any

import pytest

from aiotaskq import BrokerUnavailable, ConfigError, TaskQueue, TaskStatus, current_task
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.records import DeadLimits
from aiotaskq.drivers.memory import MemoryBackend, MemoryBroker
from aiotaskq.events import Failed, Refused, Started, Succeeded, WorkerReady
from aiotaskq.worker import Worker
from aiotaskq.worker.executor import Executor
from tests.worker.events import LONG, EventRecorder, until
from tests.worker.outage import Outage, OutageBroker

LEASE: dict[str, Any] = {"worker_lease": 0.6, "worker_heartbeat": 0.1}


def flaky(**settings: Any) -> tuple[TaskQueue, Outage]:
    outage = Outage()
    return TaskQueue("app", broker=OutageBroker(outage), **settings), outage


@pytest.mark.may_block("that is what it is about")
async def test_a_task_that_blocks_the_loop_beyond_its_lease_is_not_run_twice() -> None:
    broker = MemoryBroker()
    app = TaskQueue("app", broker=broker, **LEASE)
    runs = 0
    gate = asyncio.Event()

    @app.task
    async def block() -> int:
        nonlocal runs
        runs += 1
        await gate.wait()
        time.sleep(3)  # nothing on this loop can renew the lease for five leases
        return runs

    # Another worker, on a loop of its own, calls `maintain` meanwhile and would take the task.
    maintained, leave = threading.Event(), threading.Event()

    async def elsewhere() -> None:
        async with app.worker():
            maintained.set()
            await asyncio.to_thread(leave.wait, LONG)

    async with app.worker() as worker:
        handle = await block.kiq()
        await until(lambda: worker.running == 1)
        thread = threading.Thread(target=asyncio.run, args=(elsewhere(),))
        thread.start()
        await until(maintained.is_set)
        gate.set()
        try:
            assert await handle.result(LONG) == 1
        finally:
            leave.set()
            await asyncio.to_thread(thread.join)
    assert runs == 1
    await app.close()


async def test_a_lost_lease_is_followed_by_a_new_one_and_late_outcomes_are_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = MemoryBroker()
    app = TaskQueue("app", broker=broker, worker_lease=3600, worker_heartbeat=0.2)
    recorded = EventRecorder(app, Refused, Succeeded, Started)
    runs: list[int] = []
    first = asyncio.Event()

    @app.task
    async def job() -> int:
        runs.append(len(runs) + 1)
        mine = runs[-1]
        if mine == 1:
            try:
                await first.wait()
            except asyncio.CancelledError:
                return -1  # the task was given to another worker: its value is dropped
        return mine

    async with app.worker() as worker:
        handle = await job.kiq()
        await until(lambda: worker.running == 1)
        broker.store._time_shift += 7200  # as after a frozen process
        broker.store.maintain(DeadLimits())
        assert await handle.result(LONG) == 2
        assert await (await job.kiq()).result(LONG) == 3
    assert runs == [1, 2, 3]
    assert "going on under a new lease" in caplog.text
    assert recorded.names.count("Succeeded") == 2
    await app.close()


async def test_an_outcome_that_was_ready_when_the_lease_was_lost_is_refused() -> None:
    broker = MemoryBroker()
    app = TaskQueue("app", broker=broker, worker_lease=10, worker_heartbeat=0.3)
    recorded = EventRecorder(app, Refused)

    @app.task
    async def job() -> str:
        if len(runs) == 0:
            runs.append(1)
            # As in a frozen process, nothing runs here until the lease is long over.
            heartbeat = worker._incarnation._heartbeat  # type: ignore[union-attr]  # it runs
            heartbeat._trusted_until = time.monotonic() - 1
            broker.store._time_shift += 20
            broker.store.maintain(DeadLimits())
            return "too late"
        return "in time"

    runs: list[int] = []
    worker = app.worker()
    async with worker:
        handle = await job.kiq()
        (event,) = await recorded.count(1)
        assert event.task_id == handle.id
        assert await handle.result(LONG) == "in time"
    assert len(recorded.events) == 1
    await app.close()


async def test_a_worker_waits_for_a_broker_that_is_away_at_its_start() -> None:
    app, outage = flaky()
    outage.broker_down = True

    @app.task
    async def job() -> int:
        return 1

    async with app.worker():  # the embedding program starts all the same
        outage.broker_down = False
        assert await (await job.kiq()).result(LONG) == 1
    await app.close()


async def test_a_worker_that_waits_for_its_broker_can_be_stopped() -> None:
    app, outage = flaky()
    outage.broker_down = True
    async with app.worker():
        pass


async def test_an_impatient_worker_gives_up_at_its_start() -> None:
    app, outage = flaky()
    outage.broker_down = True
    with pytest.raises(BrokerUnavailable, match="away"):
        await asyncio.wait_for(Worker(app).run(patient=False), LONG)


async def test_a_configuration_error_raises_in_the_embedding_program() -> None:
    app = TaskQueue("app", broker="gopher://localhost")
    with pytest.raises(ConfigError, match="gopher"):
        async with app.worker():
            raise AssertionError("it was entered")


async def test_tasks_that_end_during_an_outage_of_the_broker_are_stored_after_it() -> None:
    app, outage = flaky()
    gate = asyncio.Event()
    recorded = EventRecorder(app, Refused, Started, Succeeded)

    @app.task
    async def job(n: int) -> int:
        await gate.wait()
        return n

    async with app.worker() as worker:
        handles = await app.kiq_many([job.s(n) for n in range(5)])
        await until(lambda: worker.running == 5)
        outage.broker_down = True
        gate.set()
        await until(lambda: worker.running == 0)
        await asyncio.sleep(0.3)
        outage.broker_down = False
        assert [await handle.result(LONG) for handle in handles] == [0, 1, 2, 3, 4]
        assert await (await job.kiq(9)).result(LONG) == 9
        while await (await app.broker()).depth():
            await asyncio.sleep(0.01)
    assert recorded.names.count("Refused") == 0
    assert recorded.names.count("Started") == 6
    await app.close()


async def test_tasks_that_end_during_an_outage_of_the_backend_are_stored_after_it() -> None:
    app, outage = flaky()

    @app.task
    async def job(n: int) -> int:
        return n

    async with app.worker() as worker:
        outage.backend_down = True
        recorded = EventRecorder(app, Succeeded)
        handles = await app.kiq_many([job.s(n) for n in range(5)])
        await recorded.count(5)
        assert worker.running == 0
        depth = (await (await app.broker()).depth())["default"]
        assert depth.held == 5  # the result is stored before the task is settled
        outage.backend_down = False
        assert [await handle.result(LONG) for handle in handles] == [0, 1, 2, 3, 4]
    assert await (await app.broker()).depth() == {}
    await app.close()


async def test_a_worker_that_stops_while_results_cannot_be_stored_hands_its_tasks_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aiotaskq.worker.incarnation._STORE_WAIT", 0.1)
    app, outage = flaky()
    recorded = EventRecorder(app, Succeeded)

    @app.task
    async def job() -> int:
        return 1

    async with app.worker():
        outage.backend_down = True
        handle = await job.kiq()
        await recorded.count(1)
    assert (await (await app.broker()).depth())["default"].ready == 1
    outage.backend_down = False
    async with app.worker():
        assert await handle.result(LONG) == 1
    await app.close()


async def test_an_outage_longer_than_the_lease_runs_the_task_again_and_keeps_one_outcome() -> None:
    app, outage = flaky(**LEASE)
    recorded = EventRecorder(app, Refused, Started)
    runs = 0

    @app.task
    async def job() -> int:
        nonlocal runs
        runs += 1
        mine = runs
        if mine == 1:
            outage.broker_down = outage.backend_down = True
        return mine

    async with app.worker():
        handle = await job.kiq()
        await until(lambda: runs == 1)
        await asyncio.sleep(1.5)
        app.drivers()[0].inner.store.maintain(DeadLimits())  # type: ignore[attr-defined]  # as others would
        outage.broker_down = outage.backend_down = False
        assert await handle.result(LONG) == 2
    assert recorded.names == ["Started", "Refused", "Started"]
    await app.close()


async def test_a_result_that_the_backend_refuses_for_good_fails_its_task_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aiotaskq.drivers.memory import MemoryStore

    app = TaskQueue("app", broker="memory://")
    original = MemoryStore.store

    def store(self: MemoryStore, batch: object, ttl: float | None) -> list[str]:
        for outcome in batch:  # type: ignore[attr-defined]  # outcomes
            if b"poison" in bytes(outcome.result) and outcome.status is TaskStatus.SUCCESS:
                raise ValueError("no such character in this database")
        return original(self, batch, ttl)  # type: ignore[arg-type]  # as it came

    monkeypatch.setattr(MemoryStore, "store", store)

    @app.task
    async def job(text: str) -> str:
        return text

    async with app.worker():
        good, bad = await app.kiq_many([job.s("fine"), job.s("poison")])
        assert await good.result(LONG) == "fine"
        outcome = await bad.wait(LONG)
        assert outcome.status is TaskStatus.FAILURE
        assert "no such character" in str(outcome.error)
    assert await (await app.broker()).depth() == {}
    await app.close()


async def test_an_error_of_the_worker_itself_is_logged_and_raised_at_its_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = TaskQueue("app", broker="memory://")
    ready = EventRecorder(app, WorkerReady)

    @app.task
    async def job() -> None:
        await asyncio.Event().wait()

    def accept(self: Executor, delivery: Delivery) -> None:
        raise RuntimeError("a mistake of the worker's own")

    worker = await app.worker().__aenter__()
    await ready.count(1)
    await job.kiq()
    await until(lambda: worker.running == 1)
    monkeypatch.setattr(Executor, "accept", accept)
    await job.kiq()
    await until(lambda: "the worker failed" in caplog.text)
    assert worker.running == 0  # the task was cancelled and released
    assert (await (await app.broker()).depth())["default"].ready == 2
    with pytest.raises(RuntimeError, match="worker's own"):
        await worker.__aexit__(None, None, None)
    assert [r for r in caplog.records if r.levelno >= logging.ERROR]
    await app.close()


async def test_a_lifespan_that_fails_after_the_broker_came_back_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, outage = flaky()
    outage.broker_down = True

    @app.on_startup
    async def up(state: object) -> None:
        raise LookupError("no database")

    worker = await app.worker().__aenter__()
    outage.broker_down = False
    await until(lambda: "no database" in caplog.text)
    with pytest.raises(LookupError):
        await worker.__aexit__(None, None, None)
    await app.close()


async def test_a_task_that_fails_by_an_error_of_the_worker_is_kept_and_never_loops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = TaskQueue("app", broker="memory://")
    recorded = EventRecorder(app, Failed)
    runs = 0

    @app.task
    async def job() -> None:
        nonlocal runs
        runs += 1
        assert current_task().attempt == 1

    from aiotaskq.worker.endings import Endings

    def broken(self: Endings, *args: object) -> None:
        raise RuntimeError("a mistake of the worker's own")

    monkeypatch.setattr(Endings, "succeeded", broken)
    async with app.worker():
        handle = await job.kiq()
        assert (await handle.wait(LONG)).is_err
    assert runs == 1
    assert recorded.events == []
    (letter,) = await (await app.broker()).dead("default")
    assert "mistake of the worker's own" in letter.reason
    await app.close()


async def test_an_outcome_that_cannot_be_stored_ends_no_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = TaskQueue("app", broker="memory://", result_extended=True)
    store = MemoryBackend.store

    async def picky(
        self: MemoryBackend, batch: Sequence[Outcome], ttl: float | None
    ) -> Collection[str]:
        if any(b"hostile" in bytes(one.args or b"") for one in batch):
            raise ValueError("these arguments cannot be stored")
        return await store(self, batch, ttl)

    @app.task
    async def job(text: str) -> str:
        return text

    monkeypatch.setattr(MemoryBackend, "store", picky)
    async with app.worker():
        hostile = await job.kiq("hostile")
        outcome = await hostile.wait(LONG)
        assert outcome.status is TaskStatus.FAILURE
        assert "cannot be stored" in str(outcome.error)
        assert await (await job.kiq("friendly")).result(LONG) == "friendly"

        async def never(self: MemoryBackend, batch: Any, ttl: Any) -> Collection[str]:
            raise ValueError("nothing can be stored")

        monkeypatch.setattr(MemoryBackend, "store", never)
        await job.kiq("anything")
        broker = await app.broker()
        async with asyncio.timeout(LONG):
            while await broker.depth():  # the task is settled all the same
                await asyncio.sleep(0.01)
        monkeypatch.setattr(MemoryBackend, "store", picky)
        assert await (await job.kiq("friendly")).result(LONG) == "friendly"
    await app.close()


async def test_a_process_without_free_descriptors_begins_to_take_tasks_when_it_has_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = TaskQueue("app", broker=MemoryBroker())
    run, tries = asyncio.run, 0

    def short(work: Coroutine[Any, Any, None]) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            work.close()
            raise OSError(errno.EMFILE, "Too many open files")
        run(work)

    monkeypatch.setattr(asyncio, "run", short)

    @app.task
    async def job() -> int:
        return 1

    async with app, app.worker():
        assert await (await job.kiq()).result(LONG) == 1
    assert tries == 3
