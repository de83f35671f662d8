"""Refusals for good: one settlement or outcome that can never be stored stops no other task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

from aiotaskq import (
    BatchRefused,
    BrokerFull,
    ConfigError,
    Reject,
    Retry,
    RetryLater,
    Snooze,
    TaskQueue,
    TaskStatus,
    Unsupported,
    current_task,
)
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.settlement import Again, Dead, Release, Settlement
from aiotaskq.drivers.memory import MemoryBackend
from aiotaskq.drivers.memory.consumer import MemoryConsumer
from aiotaskq.worker.health import Outage
from tests.worker.events import LONG, until

YEAR = 365 * 86_400.0
TASKS = 20

# The ways in which a driver may say it: of each entry, as the contract asks, or of a whole batch
# of which nothing has taken effect.
WAYS: dict[str, Callable[[str], Exception] | None] = {
    "each": None,
    "unsupported": Unsupported,
    "config": ConfigError,
    "any": ValueError,
}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def refuse(
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    is_refused: Callable[[Settlement], bool],
    why: Exception | None = None,
) -> list[int]:
    """Make the broker refuse to settle some deliveries, for good if no other reason is given.

    Returns the number of those that it has refused of each batch.
    """
    settle, counts = MemoryConsumer.settle, list[int]()

    async def picky(self: MemoryConsumer, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        reason = why or ValueError("never")
        refused = {at: reason for at, one in enumerate(batch) if is_refused(one)}
        counts.append(len(refused))
        kind = WAYS[way]
        if refused and kind is not None:
            raise kind("never")
        gone = await settle(self, [one for at, one in enumerate(batch) if at not in refused])
        if refused:
            raise BatchRefused(refused, answer=gone)
        return gone

    monkeypatch.setattr(MemoryConsumer, "settle", picky)
    return counts


def is_late(one: Settlement) -> bool:
    return isinstance(one, Again) and (one.envelope.delay or 0) > YEAR


async def test_a_task_that_cannot_go_back_fails_alone(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    refuse(monkeypatch, way, is_late)

    @app.task(retry=Retry(max_attempts=3, backoff=lambda _: 2 * YEAR, max_delay=3 * YEAR))
    async def job(how: str) -> str:
        if how == "snooze":
            raise Snooze(2 * YEAR)
        if how == "retry":
            raise ValueError("not today")
        return how

    async with app.worker():
        handles = await app.kiq_many([job.s(how) for how in ("a", "snooze", "b", "retry", "c")])
        ended = [await handle.wait(LONG) for handle in handles]
        # Another task ends: with it a driver that speaks of the whole batch can be understood.
        assert await (await job.kiq("later")).result(LONG) == "later"
        assert [one.return_value for one in ended] == ["a", None, "b", None, "c"]
        for one in (ended[1], ended[3]):
            assert one.status is TaskStatus.FAILURE
            assert "never" in str(one.error)
        broker = await app.broker()
        await until(lambda: not app_holds(app))
        reasons = [letter.reason for letter in await broker.dead("default")]
        assert reasons == ["it cannot go back to its queue: never"] * 2
    assert {letter.id for letter in await broker.dead("default")} == {
        handles[1].id,
        handles[3].id,
    }


def app_holds(app: TaskQueue) -> int:
    """Return how many deliveries of a memory broker are held."""
    depth = app.drivers()[0].store.depth().get("default")  # type: ignore[attr-defined]  # of memory
    return 0 if depth is None else depth.held


async def test_a_dead_letter_that_is_too_long_is_kept_without_its_details(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    refuse(monkeypatch, way, lambda one: isinstance(one, Dead) and len(one.reason) > 500)

    @app.task
    async def job(size: int) -> None:
        if size:
            raise Reject("x" * size)

    async with app.worker():
        bad, good = await app.kiq_many([job.s(1000), job.s(0)])
        await good.result(LONG)
        assert (await bad.wait(LONG)).status is TaskStatus.FAILURE
        await (await job.kiq(0)).result(LONG)
        await until(lambda: not app_holds(app))
    (letter,) = await (await app.broker()).dead("default")
    assert letter.id == bad.id
    assert set(letter.reason) == {"x"}


async def test_what_cannot_be_settled_at_all_stays_held_and_goes_back_at_the_end(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    marked = set[str]()
    refuse(
        monkeypatch,
        way,
        lambda one: one.delivery.id in marked and not isinstance(one, Release),
    )

    @app.task
    async def job() -> None: ...

    async with app.worker() as worker:
        marked.add((bad := await job.with_options(task_id="bad").kiq()).id)
        for _ in range(3):
            await (await job.kiq()).result(LONG)
        await until(lambda: worker.health.counts["unsettled"] > 0)
        await until(lambda: app_holds(app) == 1)
        assert (await bad.wait(LONG)).status is TaskStatus.SUCCESS
    assert (await (await app.broker()).depth())["default"].ready == 1


async def test_a_queue_without_room_is_waited_for(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = True
    counts = refuse(
        monkeypatch, "each", lambda one: full and isinstance(one, Again), BrokerFull("no room")
    )

    @app.task
    async def job() -> int:
        if current_task().attempt == 1:
            raise RetryLater(0)
        return current_task().attempt

    @app.task
    async def other() -> int:
        return 1

    async with app.worker() as worker:
        handle = await job.kiq()
        await until(lambda: sum(counts) >= 3)
        assert await (await other.kiq()).result(LONG) == 1
        full = False
        assert await handle.result(LONG) == 2
        assert worker.health.counts["unsettled"] == 0
    assert not await (await app.broker()).dead("default")


async def test_a_worker_that_stops_waits_for_room(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = refuse(monkeypatch, "each", lambda _: sum(counts) < 3 * TASKS, BrokerFull("no room"))
    pause, pauses, runs = Outage.pause, 0, 0

    def counted(self: Outage, error: Exception) -> float:
        nonlocal pauses
        pauses += isinstance(error, BrokerFull)
        return pause(self, error)

    monkeypatch.setattr(Outage, "pause", counted)

    @app.task
    async def job() -> None:
        nonlocal runs
        runs += 1

    async with app:
        async with app.worker(concurrency=TASKS):
            for _ in range(TASKS):
                await job.kiq()
            await until(lambda: sum(counts) >= 1)
        # It has settled all that ran: nothing goes back, and nothing runs again.
        assert not await (await app.broker()).depth()
    assert runs == TASKS
    # One for all that wait: each is longer than the one before.
    assert 1 <= pauses <= len([count for count in counts if count])


async def test_a_set_up_that_breaks_is_waited_for(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True
    refuse(monkeypatch, "config", lambda one: broken)

    @app.task
    async def job(n: int) -> int:
        return n

    async with app.worker() as worker:
        handles = await app.kiq_many([job.s(n) for n in range(30)])
        assert [await handle.result(LONG) for handle in handles] == list(range(30))
        await until(lambda: app_holds(app) == 30)
        broken = False
        await until(lambda: not app_holds(app))
        assert worker.health.counts["unsettled"] == 0
    assert not await (await app.broker()).dead("default")


@pytest.mark.parametrize("alone", [False, True], ids=["beside others", "alone"])
async def test_a_result_that_the_store_refuses_fails_its_task_alone(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch, way: str, alone: bool
) -> None:
    store = MemoryBackend.store

    async def picky(
        self: MemoryBackend, batch: Sequence[Outcome], ttl: float | None
    ) -> Collection[str]:
        refused = {
            at: ValueError("never")
            for at, one in enumerate(batch)
            if b"poison" in bytes(one.result) and one.status is TaskStatus.SUCCESS
        }
        kind = WAYS[way]
        if refused and kind is not None:
            raise kind("never")
        rest = [one for at, one in enumerate(batch) if at not in refused]
        answer = await store(self, rest, ttl)
        if refused:
            raise BatchRefused(refused, answer=answer)
        return answer

    monkeypatch.setattr(MemoryBackend, "store", picky)

    @app.task
    async def job(text: str) -> str:
        return text

    async with app.worker():
        if alone:
            bad = await job.kiq("poison")
            good = await job.kiq("fine")
        else:
            bad, good = await app.kiq_many([job.s("poison"), job.s("fine")])
        assert await good.result(LONG) == "fine"
        ended = await bad.wait(LONG)
        assert (ended.status, "never" in str(ended.error)) == (TaskStatus.FAILURE, True)
        await until(lambda: not app_holds(app))


@pytest.mark.parametrize("call", ["maintain", "fetch", "news"])
async def test_a_fault_of_a_driver_ends_no_worker(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    from aiotaskq.drivers.memory import MemoryBroker

    owner: Any = MemoryBroker if call == "maintain" else MemoryConsumer
    original, failures = getattr(owner, call), 0

    async def faulty(self: object, *args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        if failures < 2:
            failures += 1
            raise RuntimeError("a driver's own mistake")
        return await original(self, *args, **kwargs)

    @app.task
    async def job(held: bool) -> int:
        async with asyncio.timeout(LONG):
            while held and failures < 2:  # news are of interest while a task runs
                await asyncio.sleep(0.01)
        return 1

    async with app.worker():
        monkeypatch.setattr(owner, call, faulty)
        handle = await job.kiq(held=call == "news")
        await until(lambda: failures == 2)
        assert await handle.result(LONG) == 1
    assert "a driver's own mistake" in caplog.text
    assert "Traceback" in caplog.text
