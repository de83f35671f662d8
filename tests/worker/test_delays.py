"""Delayed and expired tasks: their order, their clock, and their waiting workers."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from aiotaskq import (
    Retry,
    TaskQueue,
    TaskRevoked,
    TaskStatus,
)
from aiotaskq.events import Retried, Revoked
from aiotaskq.tasks.handle import TaskHandle
from tests.worker.events import LONG, EventRecorder

HOUR = 3600.0
NEARLY = 0.05  # seconds by which two clocks of one machine may differ, with room to spare
SEND = """
import sys
from aiotaskq import TaskQueue

url, name, countdown = sys.argv[1:]
TaskQueue("app", broker=url).send_task("job", (name,), countdown=float(countdown))
"""


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.server)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store of each kind that has delays."""
    if request.param == "redis":
        found: str = request.getfixturevalue("redis_url")
        return found
    return "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/queue.db"


@pytest.fixture
def unopened(url: str) -> TaskQueue:
    app = TaskQueue("app", broker=url)
    app.drivers()  # imports the driver, which would block the loop of the test
    return app


@pytest.fixture
async def app(unopened: TaskQueue) -> AsyncIterator[TaskQueue]:
    yield unopened
    await unopened.close()


class Runs:
    """A task ``job(name)``, with the order and the times of its runs."""

    def __init__(self, app: TaskQueue) -> None:
        self._app = app
        self._loop = asyncio.get_running_loop()
        self._more = asyncio.Event()
        self.names: list[str] = []
        self.at: dict[str, float] = {}  # by the clock of the event loop
        self.task = app.task(name="job")(self._run)

    async def _run(self, name: str) -> None:
        self.names.append(name)
        self.at[name] = self._loop.time()
        self._more.set()

    async def send(self, name: str, **options: Any) -> TaskHandle[None]:
        return await self.task.with_options(**options).kiq(name)

    async def count(self, wanted: int) -> list[str]:
        """Wait for that many runs, and return their names."""
        async with asyncio.timeout(LONG):
            while len(self.names) < wanted:
                self._more.clear()
                await self._more.wait()
        return self.names

    async def idle(self) -> None:
        """Wait until the worker is up and waits for tasks."""
        await (await self.send("idle")).result(LONG)
        self.names.remove("idle")


# --- order and wake-up --------------------------------------------------------------------------


async def test_a_task_that_is_due_earlier_runs_first_though_it_was_sent_later(
    app: TaskQueue,
) -> None:
    runs = Runs(app)
    async with app.worker():
        await runs.idle()
        # Absolute times: their order does not depend on the time that sending takes.
        now = datetime.now(UTC)
        for name, seconds in (("last", 2.0), ("third", 1.8), ("second", 1.6)):
            await runs.send(name, eta=now + timedelta(seconds=seconds))
        await runs.send("first")
        assert await runs.count(4) == ["first", "second", "third", "last"]


async def test_a_task_due_soon_does_not_wait_for_one_due_in_an_hour(app: TaskQueue) -> None:
    runs = Runs(app)
    async with app.worker():
        await runs.idle()
        await runs.send("in an hour", countdown=HOUR)
        for number in range(5):
            await (await runs.send(f"{number}", countdown=0.05)).result(LONG)
    assert runs.names == [f"{number}" for number in range(5)]


async def test_a_worker_that_waits_for_a_delayed_task_runs_others_meanwhile(
    app: TaskQueue,
) -> None:
    runs = Runs(app)
    async with app.worker(queues=["one", "other"]):
        await (await runs.send("idle", queue="one")).result(LONG)
        sent = asyncio.get_running_loop().time()
        await runs.send("delayed", countdown=1.0, queue="one")
        for number in range(20):
            await (await runs.send(f"{number}", queue="other")).result(LONG)
        assert len(await runs.count(22)) == 22
    assert [name for name in runs.names if name.isdecimal()] == [str(one) for one in range(20)]
    assert runs.at["delayed"] - sent >= 1.0 - NEARLY


@pytest.mark.parametrize(
    "url", ["sqlite", pytest.param("redis", marks=pytest.mark.server)], indirect=True
)
async def test_a_sleeping_worker_is_woken_by_another_process(app: TaskQueue, url: str) -> None:
    runs = Runs(app)
    async with app.worker():
        await runs.idle()
        expected: list[str] = []
        for name, countdown in (("in an hour", "3600"), ("soon", "0.2"), ("at once", "0")):
            sender = await asyncio.create_subprocess_exec(
                sys.executable, "-c", SEND, url, name, countdown
            )
            assert await sender.wait() == 0
            if name != "in an hour":
                expected.append(name)
            assert await runs.count(len(expected)) == expected


async def test_tasks_sent_together_run_in_the_order_of_their_due_times(app: TaskQueue) -> None:
    runs = Runs(app)
    delays = [0.5, 0.1, 0.4, 0.2, 0.6, 0.3]
    async with app.worker(concurrency=1):
        await runs.idle()
        await app.kiq_many([runs.task.with_options(countdown=one).s(str(one)) for one in delays])
        assert await runs.count(len(delays)) == [str(one) for one in sorted(delays)]


async def test_tasks_due_at_once_run_by_priority(app: TaskQueue) -> None:
    runs = Runs(app)
    due = datetime.now(UTC) + timedelta(seconds=0.7)
    await app.kiq_many(
        [runs.task.with_options(eta=due, priority=level).s(str(level)) for level in (0, 9, 4)]
    )
    async with app.worker(concurrency=1):
        assert await runs.count(3) == ["9", "4", "0"]


async def test_a_delayed_task_finds_a_free_worker_while_another_is_busy(app: TaskQueue) -> None:
    runs = Runs(app)
    busy, leave = asyncio.Event(), asyncio.Event()

    @app.task
    async def occupy() -> None:
        busy.set()
        await leave.wait()

    async with app.worker(concurrency=1, name="a"), app.worker(concurrency=1, name="b"):
        await runs.idle()
        await runs.send("delayed", countdown=0.5)
        occupied = await occupy.kiq()
        await asyncio.wait_for(busy.wait(), LONG)
        assert await runs.count(1) == ["delayed"]
        leave.set()
        await occupied.result(LONG)


# --- expired ------------------------------------------------------------------------------------


@pytest.mark.may_leave("the thread of plain code, once started, stays for good")
@pytest.mark.parametrize(
    "expires",
    [
        lambda: 0.01,
        lambda: timedelta(seconds=0.01),
        lambda: datetime.now(UTC) - timedelta(seconds=1),
    ],
    ids=["seconds", "timedelta", "datetime"],
)
async def test_every_handle_of_an_expired_task_says_so(
    app: TaskQueue, expires: Callable[[], Any]
) -> None:
    runs = Runs(app)
    handle = await runs.send("never", expires=expires(), countdown=0.1)
    async with app.worker():
        with pytest.raises(TaskRevoked, match="expired"):
            await handle.result(LONG)
    assert await handle.status() is TaskStatus.REVOKED
    ended = await handle.wait(0)
    assert (ended.status, ended.is_err, ended.attempts) == (TaskStatus.REVOKED, True, 1)
    assert isinstance(ended.error, TaskRevoked)
    assert runs.names == []

    def look() -> tuple[Any, ...]:
        plain = app.async_result(handle.id)
        with pytest.raises(TaskRevoked, match="expired"):
            plain.get(timeout=LONG)
        error = plain.get(timeout=LONG, propagate=False)
        assert isinstance(error, TaskRevoked)
        assert isinstance(plain.result, TaskRevoked)
        return plain.status, plain.ready(), plain.successful(), plain.failed()

    assert await asyncio.to_thread(look) == ("REVOKED", True, False, False)


async def test_a_task_that_expires_later_runs(app: TaskQueue) -> None:
    runs = Runs(app)
    async with app.worker():
        for number, expires in enumerate(
            (HOUR, timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1))
        ):
            await (await runs.send(f"{number}", countdown=0.05, expires=expires)).result(LONG)
    assert runs.names == ["0", "1", "2"]


# --- clocks -------------------------------------------------------------------------------------


class Skewed:
    """The module `time` of a process whose clock is wrong."""

    def __init__(self, ahead: float) -> None:
        self._ahead = ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        return time.time() + self._ahead

    def time_ns(self) -> int:
        return time.time_ns() + int(self._ahead * 1e9)


@pytest.fixture(params=[(HOUR, -HOUR), (-HOUR, HOUR)], ids=["sender ahead", "worker ahead"])
def skewed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks of the sender and of the worker are wrong; that of the store is right.

    Where the store is the machine itself, memory or a file, its clock is the drivers'.
    """
    sender, worker = map(Skewed, request.param)
    patched = set()
    for name, module in list(sys.modules.items()):
        ours = name.startswith("aiotaskq.") and not name.startswith("aiotaskq.drivers.")
        if ours and getattr(module, "time", None) is time:
            in_worker = name.startswith("aiotaskq.worker.")
            monkeypatch.setattr(module, "time", worker if in_worker else sender)
            patched.add(name)
    assert {"aiotaskq.client.prepare", "aiotaskq.worker.endings"} <= patched


async def not_before(
    seconds: float, begin: Callable[[], Awaitable[TaskHandle[None]]], runs: Runs, name: str
) -> None:
    """Check that a task runs, and no earlier than `seconds` after it was sent."""
    sent = asyncio.get_running_loop().time()
    await (await begin()).result(LONG)
    assert runs.at[name] - sent >= seconds - NEARLY


@pytest.mark.usefixtures("skewed")
async def test_countdowns_and_times_are_the_stores_whatever_the_clocks_of_others(
    app: TaskQueue,
) -> None:
    runs = Runs(app)
    async with app.worker():
        await not_before(0.2, lambda: runs.send("a", countdown=0.2), runs, "a")
        eta = datetime.now(UTC) + timedelta(seconds=0.3)
        await not_before(0.2, lambda: runs.send("b", eta=eta), runs, "b")
        past = datetime.now(UTC) - timedelta(seconds=1)
        await not_before(0.0, lambda: runs.send("c", eta=past), runs, "c")


@pytest.mark.usefixtures("skewed")
async def test_expiry_is_the_stores_whatever_the_clocks_of_others(app: TaskQueue) -> None:
    runs = Runs(app)
    minute = timedelta(minutes=1)
    async with app.worker():
        for number, expires in enumerate((60, minute, datetime.now(UTC) + minute)):
            await (await runs.send(f"{number}", countdown=0.1, expires=expires)).result(LONG)
        for expires in (0.1, timedelta(seconds=0.1), datetime.now(UTC) + minute / 600):
            with pytest.raises(TaskRevoked, match="expired"):
                await (await runs.send("over", countdown=0.3, expires=expires)).result(LONG)
    assert runs.names == ["0", "1", "2"]


@pytest.mark.usefixtures("skewed")
async def test_the_delays_of_retries_are_the_stores_and_so_is_an_expiry_between_them(
    app: TaskQueue,
) -> None:
    loop = asyncio.get_running_loop()
    began: list[float] = []

    @app.task(retry=Retry(max_attempts=3, delay=0.2, backoff="constant", jitter=False))
    async def job() -> None:
        began.append(loop.time())
        raise OSError

    async with app.worker():
        ended = await (await job.with_options(expires=60).kiq()).wait(LONG)
        assert (ended.status, ended.attempts) == (TaskStatus.FAILURE, 3)
        pauses = [after - before for before, after in pairwise(began)]
        assert min(pauses) >= 0.2 - NEARLY
        with pytest.raises(TaskRevoked, match="expired"):
            await (await job.with_options(expires=0.15).kiq()).result(LONG)


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
async def test_a_naive_datetime_is_taken_in_the_applications_time_zone(
    app: TaskQueue, zone: str
) -> None:
    await asyncio.to_thread(setattr, app.conf, "timezone", zone)  # it reads a file
    runs = Runs(app)
    there = datetime.now(ZoneInfo(zone)).replace(tzinfo=None)
    async with app.worker():
        await runs.send("later", eta=there + timedelta(hours=1))
        await (await runs.send("now", eta=there, expires=there + timedelta(hours=1))).result(LONG)
        with pytest.raises(TaskRevoked, match="expired"):
            await (await runs.send("over", expires=there - timedelta(seconds=1))).result(LONG)
        assert (await (await app.broker()).depth())["default"].delayed == 1
    assert runs.names == ["now"]


async def test_a_task_that_expired_is_revoked_and_never_runs(app: TaskQueue) -> None:
    ran = False

    @app.task
    async def job() -> None:
        nonlocal ran
        ran = True

    handle = await job.with_options(expires=datetime.now(UTC) - timedelta(seconds=1)).kiq()
    async with app.worker():
        with pytest.raises(TaskRevoked, match="expired"):
            await handle.result(LONG)
    assert not ran


async def test_a_task_that_expires_between_its_attempts_is_revoked(app: TaskQueue) -> None:
    recorded = EventRecorder(app, Retried, Revoked)

    @app.task
    async def job() -> None:
        raise OSError

    async with app.worker():
        for seconds in (0.3, 3.0, 30.0):
            recorded.events.clear()
            retry = Retry(max_attempts=2, delay=2 * seconds, jitter=False)
            handle = await job.with_options(expires=seconds, retry=retry).kiq()
            with pytest.raises(TaskRevoked, match="expired"):
                await handle.result(LONG)
            if recorded.names != ["Revoked"]:  # it expired before its first attempt: all is busy
                break
    assert recorded.names == ["Retried", "Revoked"]
