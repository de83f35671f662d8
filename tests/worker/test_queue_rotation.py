"""Several queues of a worker: one after the other, or by weight."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from aiotaskq import ConfigError, TaskQueue
from aiotaskq.contract.message import Delivery
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.drivers.memory.consumer import MemoryConsumer
from tests.worker.events import LONG

WEIGHTS = {"critical": 6, "default": 3, "low": 1}


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.server)])
def unopened(request: pytest.FixtureRequest, tmp_path: Path) -> TaskQueue:
    url: str = f"sqlite:///{tmp_path}/queue.db" if request.param == "sqlite" else "memory://"
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
    app = TaskQueue("app", broker=url)
    app.drivers()  # imports the driver, which would block the loop of the test
    return app


@pytest.fixture
async def app(unopened: TaskQueue) -> AsyncIterator[TaskQueue]:
    yield unopened
    await unopened.close()


async def run_all(
    app: TaskQueue,
    depths: Mapping[str, int],
    queues: Sequence[str] | Mapping[str, int] | None,
    concurrency: int = 1,
) -> list[str]:
    """Fill queues, run a worker until they are empty; return the queue of each run, in order."""
    seen: list[str] = []

    @app.task
    async def job(queue: str) -> None:
        seen.append(queue)
        await asyncio.sleep(0)

    for queue, count in depths.items():
        await app.kiq_many([job.with_options(queue=queue).s(queue)] * count)
    async with asyncio.timeout(LONG):
        await app.worker(queues=queues, concurrency=concurrency, burst=True).run()
    assert Counter(seen) == depths
    return seen


async def test_full_queues_share_a_worker_by_their_weights(app: TaskQueue) -> None:
    seen = await run_all(app, dict.fromkeys(WEIGHTS, 60), WEIGHTS)
    assert seen[0] == "critical"
    for start in range(90):  # until one queue is empty
        assert Counter(seen[start : start + 10]) == WEIGHTS


async def test_the_share_of_an_empty_queue_goes_to_the_others(app: TaskQueue) -> None:
    seen = await run_all(app, {"low": 20, "default": 60}, WEIGHTS)
    # The turns of the empty queue go to the heavier one of the others: now 9 to 1.
    assert Counter(seen[:50]) == {"default": 45, "low": 5}


async def test_the_last_queue_alone_has_all_of_the_worker(app: TaskQueue) -> None:
    assert await run_all(app, {"low": 5}, WEIGHTS) == ["low"] * 5


async def test_a_worker_of_many_slots_leaves_no_queue_without_its_turn(app: TaskQueue) -> None:
    seen = await run_all(app, dict.fromkeys(WEIGHTS, 200), WEIGHTS, concurrency=4)
    # A fetch takes up to 4 tasks, one for each free slot, and each queue comes first in 10 fetches.
    first = seen.index("low")
    assert first < 10 * 4
    assert "low" in seen[first + 1 : first + 1 + 20 * 4]


async def test_a_plain_list_is_drained_one_queue_after_the_other(app: TaskQueue) -> None:
    seen = await run_all(app, dict.fromkeys(WEIGHTS, 10), ["low", "critical", "default"])
    assert seen == ["low"] * 10 + ["critical"] * 10 + ["default"] * 10


async def test_any_name_may_have_a_weight_in_a_mapping(app: TaskQueue) -> None:
    seen = await run_all(app, {"a:3": 9, "b c": 3}, {"a:3": 3, "b c": 1})
    assert Counter(seen[:8]) == {"a:3": 6, "b c": 2}


class NotingBroker(MemoryBroker):
    """A broker that records the orders of its consumers' fetches."""

    orders: ClassVar[list[Sequence[str] | None]] = []

    def consumer(
        self, queues: Sequence[str], *, name: str, lease: float, about: bytes = b""
    ) -> NotingConsumer:
        return NotingConsumer(self.store, queues, name=name, lease=lease, about=about)


class NotingConsumer(MemoryConsumer):
    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        NotingBroker.orders.append(order)
        return await super().fetch(limit, wait, order=order)


@pytest.mark.parametrize(
    ("queues", "orders"),
    [
        (["a", "b"], {None}),
        (["a"], {None}),
        ({"a": 3}, {None}),
        (None, {None}),
        ({"a": 1, "b": 1}, {("a", "b"), ("b", "a")}),
    ],
)
async def test_an_order_is_asked_for_only_where_there_are_weights(
    queues: Any, orders: set[Any]
) -> None:
    NotingBroker.orders.clear()
    app = TaskQueue("app", broker=NotingBroker())
    await run_all(app, {"default" if queues is None else "a": 10}, queues)
    assert set(NotingBroker.orders) == orders
    await app.close()


@pytest.mark.parametrize("weight", [0, -1, 1.5, "3", True, None])
def test_a_weight_is_a_whole_number_from_1_on(weight: Any) -> None:
    app = TaskQueue("app", broker="memory://")
    with pytest.raises(ConfigError, match=r"the weight of the queue low is .*1 is the least"):
        app.worker(queues={"critical": 6, "low": weight})


def test_a_mapping_without_queues_is_refused() -> None:
    with pytest.raises(ConfigError, match="queues is empty"):
        TaskQueue("app", broker="memory://").worker(queues={})
