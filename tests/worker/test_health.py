"""The health of a worker, and the tasks that it knows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from aiotaskq import BrokerUnavailable, TaskQueue
from aiotaskq.contract.records import Grant, News
from aiotaskq.events import HealthChanged
from aiotaskq.worker import health as health
from tests.worker.events import LONG, EventRecorder, until
from tests.worker.outage import Outage, OutageBroker, OutageConsumer


@pytest.fixture
def outage() -> Outage:
    return Outage()


@pytest.fixture
async def flaky(outage: Outage, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TaskQueue]:
    monkeypatch.setattr(health, "SICK_AFTER", 0.2)
    app = TaskQueue("flaky", broker=OutageBroker(outage))
    app.conf.update(worker_lease=LONG, worker_heartbeat=0.05)
    yield app
    await app.close()


async def test_a_worker_is_unhealthy_while_its_broker_is_unreachable(
    flaky: TaskQueue, outage: Outage
) -> None:
    recorded = EventRecorder(flaky, HealthChanged)
    async with flaky.worker() as worker:
        outage.broker_down = True
        sick = (await recorded.count(1))[0]
        assert "cannot fetch tasks: the broker is away" in sick.problems[0]
        assert sick.worker == worker.options.name
        outage.broker_down = False
        await until(lambda: not worker.health.problems)
        assert recorded.events[-1].problems == ()


async def test_a_worker_that_has_become_idle_is_healthy_when_the_broker_is_back(
    flaky: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, gate, news = True, asyncio.Event(), OutageConsumer.news

    async def flaky_news(self: OutageConsumer) -> News:
        if away:
            raise BrokerUnavailable("the broker is away")
        return await news(self)

    monkeypatch.setattr(OutageConsumer, "news", flaky_news)

    @flaky.task
    async def job() -> None:
        await gate.wait()

    async with flaky.worker() as worker:
        handle = await job.kiq()
        await until(lambda: len(worker.health.problems) == 1)
        assert "cannot hear of cancelled tasks" in worker.health.problems[0]
        gate.set()
        await handle.result(LONG)
        await until(lambda: not worker.running)
        away = False
        await until(lambda: not worker.health.problems)


async def test_a_worker_is_healthy_after_a_lease_lost_in_an_outage(
    outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SICK_AFTER", 0.2)
    broker = OutageBroker(outage)
    app = TaskQueue("flaky", broker=broker)
    app.conf.update(worker_lease=LONG, worker_heartbeat=LONG / 4)  # its fetch raises
    recorded = EventRecorder(app, HealthChanged)
    async with app.worker() as worker:
        outage.broker_down = True
        await recorded.count(1)
        for consumer in await broker.consumers():
            grant = Grant(consumer.id, tuple(consumer.queues), LONG)
            await broker.inner.lease(grant).end("it gave no sign of life")
        outage.broker_down = False
        await until(lambda: worker.health.counts["lost"] == 1)
        await until(lambda: not worker.health.problems)
        assert recorded.events[-1].problems == ()
    await app.close()


async def test_a_worker_is_unhealthy_while_its_result_backend_is_unreachable(
    flaky: TaskQueue, outage: Outage
) -> None:
    recorded = EventRecorder(flaky, HealthChanged)

    @flaky.task
    async def job() -> int:
        return 1

    async with flaky.worker() as worker:
        outage.backend_down = True
        handle = await job.kiq()
        [sick] = await recorded.count(1)
        assert sick.problems == (
            "finished tasks wait for their results to be stored: the result backend is away",
        )
        outage.backend_down = False
        assert await handle.result(LONG) == 1
        await until(lambda: not worker.health.problems)


async def test_a_short_outage_is_no_problem(flaky: TaskQueue, outage: Outage) -> None:
    recorded = EventRecorder(flaky, HealthChanged)

    @flaky.task
    async def job() -> int:
        return 1

    health.SICK_AFTER = LONG  # the fixture restores it
    async with flaky.worker():
        outage.backend_down = True
        handle = await job.kiq()
        await asyncio.sleep(0.3)
        outage.backend_down = False
        assert await handle.result(LONG) == 1
    assert recorded.events == []


async def test_an_unknown_task_goes_soon_to_a_worker_that_lists_it(
    app: TaskQueue,
) -> None:
    """During a rolling deploy old workers get new tasks, and put them back."""
    new = TaskQueue("new", broker="memory://rolling")
    old = TaskQueue("old", broker="memory://rolling")

    @new.task(name="job")
    async def job() -> str:
        return "done"

    async with old.worker() as puzzled:
        handle = await job.kiq()
        await until(lambda: puzzled.health.counts["unknown"] == 1)
        async with new.worker(name="knows"):
            infos = await _infos(new, 2)
            assert {"job"} in infos
            later = [await job.kiq() for _ in range(20)]
            for one in later:
                assert await one.result(LONG) == "done"
        assert await handle.status() in ("PENDING", "SUCCESS")
    for each in (old, new):
        await each.close()


async def _infos(app: TaskQueue, count: int) -> list[set[str]]:
    workers = await app.workers()
    while len(workers) < count:
        await asyncio.sleep(0.01)
        workers = await app.workers()
    return [set(worker.tasks) for worker in workers]
