"""Threads as slots, over each broker: tasks that are handed back run elsewhere, and once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aiotaskq import TaskQueue, current_task
from tests.worker.events import LONG, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(120)]


@pytest.fixture(params=["sqlite", "redis", "postgres", "rabbit"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> TaskQueue:
    broker, backend = f"sqlite:///{tmp_path}/queue.db", None
    if request.param == "rabbit":
        broker, backend = request.getfixturevalue("rabbit_server").url(), "memory://"
    elif request.param != "sqlite":
        broker = request.getfixturevalue(f"{request.param}_url")
    app = TaskQueue("app", broker=broker, backend=backend, prefix=f"slots_{tmp_path.name[-20:]}")
    app.drivers()  # imports the drivers, which would block the loop of the test
    return app


@pytest.fixture
async def over(loaded: TaskQueue) -> AsyncIterator[TaskQueue]:
    yield loaded
    await loaded.close()


async def test_each_task_runs_once_and_those_of_other_kinds_get_past(over: TaskQueue) -> None:
    app, gate = over, threading.Event()
    came: list[tuple[str, int]] = []

    @app.task
    def job(number: int) -> None:
        came.append((current_task().worker, number))
        gate.wait(LONG)

    @app.task
    async def quick(number: int) -> int:
        return number

    try:
        async with app.worker(name="a", threads=1), app.worker(name="b", threads=1):
            handles = await app.kiq_many([job.s(number) for number in range(10)])
            await until(lambda: len(came) == 2)
            assert {name for name, _ in came} == {"a", "b"}
            past = await app.kiq_many([quick.s(number) for number in range(50)])
            assert [await handle.result(LONG) for handle in past] == list(range(50))
            assert len(came) == 2
            gate.set()
            for handle in handles:
                assert (await handle.wait(LONG)).attempts == 1
    finally:
        gate.set()
    assert Counter(number for _, number in came) == Counter(range(10))
