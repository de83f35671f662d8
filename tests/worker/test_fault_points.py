"""A few tasks of every kind, with one fault at each call that is made to the servers.

In a run of its own each call fails once, in each `FaultKind`. Then the same with a process that
dies at that call, and another one that finishes the tasks.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from aiotaskq import (
    Reject,
    Retry,
    TaskHandle,
    TaskQueue,
    TaskResult,
    Unavailable,
    current_task,
)
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import Depth
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.drivers.redis import RedisBroker
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.testing import FaultKind, FaultPlan, FaultPoint, FlakyBroker
from tests.worker.events import LONG

T = TypeVar("T")

SETTINGS: dict[str, Any] = {"worker_lease": 60, "worker_heartbeat": 0.05}
AT_ONCE = 40  # runs side by side, which mostly wait
# Calls that workers repeat by themselves, and the number of these that are to fail.
PERIODIC = {"lease.renew": 2, "broker.maintain": 1, "consumer.news": 1}


class Case(NamedTuple):
    """The fault of one run."""

    step: FaultPoint | None = None
    way: FaultKind = FaultKind.NOT_SENT
    deadly: bool = False

    @property
    def comes_by_itself(self) -> bool:
        """Return whether an idle worker makes that call, too."""
        return self.step is not None and self.step.call in ("lease.renew", "broker.maintain")

    def __str__(self) -> str:
        where = "nowhere" if self.step is None else f"{self.step.call} {self.step.number}"
        return f"{where} {self.way}{', deadly' if self.deadly else ''}"


class Ledger:
    """The results of one run, and the state of its store."""

    def __init__(self) -> None:
        self.plan = FaultPlan()
        self.starts: Counter[str] = Counter()
        self.results: list[TaskResult[Any]] = []
        self.depth: dict[str, Depth] = {}
        self.letters: list[str] = []
        self.consumers = 0

    @property
    def ends(self) -> dict[str, tuple[str, str, int]]:
        """The end of each task: status, value or error, and attempt."""
        return {
            one.task_id: (one.status, repr(one.error or one.return_value), one.attempts)
            for one in self.results
        }


def make_app(broker: Broker, starts: Counter[str]) -> TaskQueue:
    app = TaskQueue("app", broker=broker, **SETTINGS)

    @app.task(name="plain")
    async def plain(name: str, number: int) -> int:
        starts[name] += 1
        return number * 2

    @app.task(name="twice", retry=Retry(max_attempts=3, delay=0.01, jitter=False))
    async def twice(name: str) -> str:
        starts[name] += 1
        if current_task().attempt == 1:
            raise ValueError("not yet")
        return "at last"

    @app.task(name="fail")
    async def fail(name: str) -> None:
        starts[name] += 1
        raise KeyError(name)

    @app.task(name="slow")
    async def slow(name: str) -> None:
        starts[name] += 1
        await asyncio.sleep(0.7)  # the worker asks for news meanwhile

    @app.task(name="reject")
    async def reject(name: str) -> None:
        starts[name] += 1
        raise Reject("not wanted")

    return app


async def send(app: TaskQueue) -> list[TaskHandle[Any]]:
    """Send the tasks; return their handles."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("plain", (1,), {}),
        ("plain", (2,), {}),
        ("twice", (), {}),
        ("fail", (), {}),
        ("reject", (), {}),
        ("slow", (), {}),
        ("plain", (3,), {"countdown": 0.3}),
        ("plain", (4,), {}),
    ]
    handles = []
    for number, (name, args, options) in enumerate(calls):
        task_id = f"{name} {number}"
        call = app.tasks[name].with_options(task_id=task_id, **options).s(task_id, *args)
        handles.append(await patiently(partial(app.send_call, call)))
    await patiently(handles[-1].cancel)
    return handles


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call until the servers can be reached, as a careful caller does."""
    async with asyncio.timeout(LONG):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.01)


async def play(broker: Broker, case: Case) -> Ledger:
    """Send the tasks, run a worker until they end, and look at the store."""
    ledger, struck = Ledger(), asyncio.Event()
    loop = asyncio.get_running_loop()
    ledger.plan = FaultPlan(
        case.step,
        case.way,
        deadly=case.deadly,
        on_fault=lambda: loop.call_soon_threadsafe(struck.set),
    )
    flaky = make_app(FlakyBroker(broker.clone(), ledger.plan), ledger.starts)
    # If a process dies, it is that of the worker; another one sends.
    sender = make_app(broker.clone(), ledger.starts) if case.deadly else flaky
    await broker.open()
    try:
        handles = await send(sender)
        if case.deadly:
            await die(flaky, broker, ledger.plan, enough(case, handles, struck))
            flaky = sender
        async with flaky.worker(concurrency=3):
            await enough(case, handles, struck)
            ledger.results = [await result(one) for one in handles]
        ledger.depth = dict(await broker.depth())
        ledger.letters = [one.id for one in await broker.dead("default")]
        ledger.consumers = len(await broker.consumers())
    finally:
        await flaky.close()
        await sender.close()
        await broker.close()
    return ledger


async def result(handle: TaskHandle[Any]) -> TaskResult[Any]:
    return await patiently(lambda: handle.wait(LONG))


async def enough(case: Case, handles: list[TaskHandle[Any]], struck: asyncio.Event) -> None:
    """Wait for the call that fails, or for the end of the tasks if it may never come."""
    async with asyncio.timeout(LONG), asyncio.TaskGroup() as group:
        striking = group.create_task(struck.wait())
        if not case.comes_by_itself:
            ending = asyncio.gather(*map(result, handles))
            futures: list[asyncio.Future[Any]] = [striking, ending]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            striking.cancel()
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)


async def die(app: TaskQueue, broker: Broker, plan: FaultPlan, died: Awaitable[None]) -> None:
    """Run a worker until its process dies, and end its leases as an observer would."""
    worker = asyncio.create_task(app.worker(concurrency=3).run())
    await died
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    await app.close()
    for grant in plan.grants:
        lease = broker.lease(grant)
        await lease.end("killed")
        await lease.close()


def steps(calls: Counter[str], *, every: bool) -> Iterator[FaultPoint]:
    """Yield the calls to fail at: every one, or the first and the last of each name."""
    for name, count in sorted({**calls, **PERIODIC}.items()):
        numbers = range(1, count + 1) if every else sorted({1, count})
        yield from (FaultPoint(name, number) for number in numbers)


async def disturb(make_broker: Callable[[], Broker], *, every: bool, deadly: bool) -> None:
    """Run the tasks once for each kind of fault at each call, and compare the ends."""
    calm = await play(make_broker(), Case(deadly=deadly))
    assert calm.starts == {
        "plain 0": 1,
        "plain 1": 1,
        "twice 2": 2,
        "fail 3": 1,
        "reject 4": 1,
        "slow 5": 1,
        "plain 6": 1,
    }
    cases = [
        Case(step, way, deadly)
        for step, way in itertools.product(steps(calm.plan.calls, every=every), FaultKind)
    ]
    missed = {(one.step.call, one.way) for one in cases if one.step is not None}
    room = asyncio.Semaphore(AT_ONCE)

    async def check(case: Case) -> list[str]:
        async with room:
            ledger = await play(make_broker(), case)
        if ledger.plan.hit and case.step is not None:
            missed.discard((case.step.call, case.way))
        return [f"{case}: {one}" for one in differences(ledger, calm, deadly=deadly)]

    found = await asyncio.gather(*map(check, cases))
    assert not [one for problems in found for one in problems]
    assert not missed


def differences(ledger: Ledger, calm: Ledger, *, deadly: bool) -> Iterator[str]:
    """Yield the differences from a run without a fault."""
    if ledger.ends != calm.ends:
        yield f"ended otherwise: {set(ledger.ends.items()) ^ set(calm.ends.items())}"
    again = ledger.starts - calm.starts
    if calm.starts - ledger.starts or max(again.values(), default=0) > deadly:
        yield f"ran {ledger.starts} times"
    if ledger.depth != {"default": Depth(dead=1)}:
        yield f"left {ledger.depth}"
    if ledger.letters != ["reject 4"]:
        yield f"buried {ledger.letters}"
    if ledger.consumers:
        yield "a consumer is left"


@pytest.mark.parametrize("deadly", [False, True], ids=["fails", "dies"])
class TestEachStep:
    async def test_in_memory(self, deadly: bool) -> None:
        await disturb(MemoryBroker, every=True, deadly=deadly)

    async def test_on_sqlite(self, deadly: bool, tmp_path: Path) -> None:
        numbers = itertools.count()
        await disturb(
            lambda: SQLiteBroker(f"sqlite:///{tmp_path}/{next(numbers)}.db"),
            every=False,
            deadly=deadly,
        )

    async def test_on_redis(self, deadly: bool, redis_url: str) -> None:
        numbers = itertools.count()
        await disturb(
            lambda: RedisBroker(redis_url, prefix=f"p{next(numbers)}"), every=False, deadly=deadly
        )
