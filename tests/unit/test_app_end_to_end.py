"""`TaskQueue`: tasks from the call to the result."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

from aiotaskq import (
    ConfigError,
    EncodeError,
    PayloadTooLarge,
    ResultTimeout,
    State,
    TaskFailed,
    TaskQueue,
    TaskRevoked,
    TaskStatus,
    current_task,
)
from aiotaskq.contract.message import Delivery, Message
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.encoding.codec import Codec

ROOT = Path(__file__).parents[2]


class Model(BaseModel):
    id: UUID


@dataclass
class Cat:
    name: str


@dataclass
class Dog:
    barks: int


@pytest.fixture
async def app() -> AsyncIterator[TaskQueue]:
    async with TaskQueue("t", broker="memory://") as app:
        yield app


async def waiting(app: TaskQueue, queue: str = "default") -> list[tuple[Message, Delivery]]:
    """Fetch and settle the waiting messages of a queue."""
    consumer = (await app.broker()).consumer([queue], name="test", lease=60)
    await consumer.open()
    taken = await consumer.fetch(100, 0)
    await consumer.settle([Done(delivery) for delivery in taken])
    await consumer.close()
    return [(Codec(accept=["json", "msgpack", "pickle"]).decode_message(d.body), d) for d in taken]


async def only(app: TaskQueue, queue: str = "default") -> Message:
    ((message, _),) = await waiting(app, queue)
    return message


def add(x: int, y: int) -> int:
    return x + y


# --- bad input ----------------------------------------------------------------------------------


async def test_of_a_batch_with_a_bad_call_none_is_sent(app: TaskQueue) -> None:
    app.conf.max_payload_size = 500
    task = app.task(name="t")(lambda x: x)
    for bad, error in [(object(), EncodeError), ("x" * 1000, PayloadTooLarge)]:
        with pytest.raises(error):
            await app.kiq_many([task.s(1), task.s(bad), task.s(2)])
    assert await waiting(app) == []
    assert await app.kiq_many([]) == []


async def test_a_call_by_name_is_checked_where_the_task_is_known(app: TaskQueue) -> None:
    task = app.task(add)
    with pytest.raises(TypeError, match="missing"):
        await app.send(task.name, (1,))
    await app.send("unknown.here", (1, 2, 3))
    with pytest.raises(ConfigError):
        await app.send("")
    with pytest.raises(TypeError, match="list or a tuple"):
        await app.send(task.name, "12")


async def test_bad_input_has_a_clear_end(app: TaskQueue) -> None:
    @app.task
    async def take(number: int) -> int:
        return number

    @app.task
    async def give(size: int) -> Any:
        return object() if size == 0 else "x" * size

    app.conf.max_result_size = 1000
    async with app.worker():
        with pytest.raises(TaskFailed, match=r"DecodeError: .*number"):
            await (await take.kiq("five")).result(120)  # type: ignore[arg-type]  # that is the point
        with pytest.raises(TaskFailed, match=r"EncodeError: .*object"):
            await (await give.kiq(0)).result(120)
        with pytest.raises(TaskFailed, match="max_result_size") as large:
            await (await give.kiq(2000)).result(120)
        assert large.value.exc_type == "PayloadTooLarge"
        assert await (await give.kiq(3)).result(120) == "xxx"


class Thorny(Exception):
    """A class that cannot be shown, described or changed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __setattr__(self, name: str, value: object) -> None:
        raise RuntimeError("no attributes")

    @property
    def args(self) -> Any:  # type: ignore[override]  # that is the point
        raise RuntimeError("no arguments")


@dataclass
class ThornyArgument:
    n: int

    def __post_init__(self) -> None:
        raise Thorny


async def test_hostile_classes_fail_their_task_and_not_the_worker(app: TaskQueue) -> None:
    @app.task
    async def fail() -> None:
        raise Thorny

    @app.task
    async def take(argument: ThornyArgument) -> None: ...

    @app.task
    async def fine() -> int:
        return 1

    async with app.worker():
        with pytest.raises(TaskFailed) as caught:
            await (await fail.kiq()).result(120)
        assert caught.value.exc_type == "Thorny"
        with pytest.raises(TaskFailed, match=r"DecodeError: .*argument"):
            await (await app.send(take.name, ({"n": 1},))).result(120)
        assert await (await fine.kiq()).result(120) == 1


# --- results ------------------------------------------------------------------------------------


async def test_a_result_has_its_annotated_type(app: TaskQueue) -> None:
    @app.task
    async def model(key: UUID) -> Model:
        return Model(id=key)

    @app.task
    def pet(name: str | None) -> Cat | Dog:
        return Dog(1) if name is None else Cat(name)

    async with app.worker():
        assert await (await model.kiq(UUID(int=1))).result(120) == Model(id=UUID(int=1))
        assert await (await pet.kiq("Tom")).result(120) == Cat("Tom")
        assert await (await pet.kiq(None)).result(120) == Dog(1)


@pytest.mark.parametrize("serializer", ["json", "msgpack", "pickle"])
async def test_every_serializer_serves_a_whole_task(serializer: str) -> None:
    app = TaskQueue(
        "t",
        broker="memory://",
        task_serializer=serializer,
        result_serializer=serializer,
        accept_content=["json", "msgpack", "pickle"],
    )

    @app.task
    async def next_day(day: datetime, *, by: timedelta) -> datetime:
        return day + by

    at = datetime(2030, 1, 1, 12, tzinfo=UTC)
    async with app, app.worker():
        handle = await next_day.kiq(at, by=timedelta(days=1))
        assert await handle.result(120) == at + timedelta(days=1)


async def test_an_outcome_tells_all(app: TaskQueue) -> None:
    @app.task(queue="default")
    async def divide(x: int, y: int) -> float:
        return x / y

    async with app.worker(name="theworker"):
        good = await (await divide.kiq(1, 2)).wait(120)
        bad = await (await divide.kiq(1, 0)).wait(120)
    assert (good.is_err, good.status, good.return_value, good.error) == (
        False,
        TaskStatus.SUCCESS,
        0.5,
        None,
    )
    assert (good.worker, good.name, good.queue, good.attempts) == (
        "theworker",
        divide.name,
        "default",
        1,
    )
    assert good.execution_time is not None
    assert good.date_done is not None
    assert (bad.is_err, bad.status, bad.return_value) == (True, TaskStatus.FAILURE, None)
    assert isinstance(bad.error, ZeroDivisionError)
    assert "x / y" in (bad.traceback or "")
    with pytest.raises(ZeroDivisionError):
        bad.value()


async def test_a_handle_can_be_awaited_asked_and_forgotten(app: TaskQueue) -> None:
    @app.task
    async def one() -> int:
        return 1

    handle = await one.kiq()
    assert await handle.status() is TaskStatus.PENDING
    with pytest.raises(ResultTimeout, match=handle.id):
        await handle.result(timeout=0.01)
    async with app.worker():
        assert await handle == 1
    assert await handle.status() is TaskStatus.SUCCESS
    assert await app.handle(handle.id).result(120) == 1
    assert await handle.forget()
    assert not await handle.forget()
    assert await handle.status() is TaskStatus.PENDING


async def test_a_timeout_of_zero_returns_an_outcome_that_is_there(app: TaskQueue) -> None:
    @app.task
    async def one() -> int:
        return 1

    handle = await one.kiq()
    with pytest.raises(ResultTimeout):
        await handle.result(timeout=0)
    async with app.worker():
        await handle.result(120)
    assert await handle.result(timeout=0) == 1


async def test_an_expired_task_never_starts_and_says_so(app: TaskQueue) -> None:
    started: list[int] = []

    @app.task
    async def note() -> None:
        started.append(1)

    handle = await note.with_options(expires=-1).kiq()
    delayed = await note.with_options(countdown=0.05, expires=0.01).kiq()
    async with app.worker():
        for expired in (handle, delayed):
            with pytest.raises(TaskRevoked, match="expired"):
                await expired.result(120)
    assert started == []


async def test_a_timeout_of_the_callers_own_is_not_taken_for_ours(app: TaskQueue) -> None:
    handle = await app.send("x")
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.01):
            await handle.result()
    assert not isinstance(caught.value, ResultTimeout)


async def test_a_cancelled_task_never_starts(app: TaskQueue) -> None:
    started: list[int] = []

    @app.task
    async def note() -> None:
        started.append(1)

    handle = await note.kiq()
    await handle.cancel()
    async with app.worker():
        with pytest.raises(TaskRevoked, match="cancelled"):
            await handle.result(120)
    assert started == []
    assert await handle.status() is TaskStatus.REVOKED


async def test_without_a_backend_tasks_run_and_results_are_refused() -> None:
    app = TaskQueue("t", broker="memory://", backend="disabled://")
    done = asyncio.Event()

    @app.task
    async def note() -> None:
        done.set()

    async with app, app.worker():
        handle = await note.kiq()
        async with asyncio.timeout(120):
            await done.wait()
        with pytest.raises(ConfigError, match="result_backend"):
            await handle.result(1)
        await handle.cancel()


# --- loops and threads --------------------------------------------------------------------------


def test_one_application_serves_many_loops_one_after_another() -> None:
    app = TaskQueue("t", broker="memory://")
    task = app.task(add)

    async def main(n: int) -> int:
        async with app.worker():
            return await (await task.kiq(n, 1)).result(120)

    assert [asyncio.run(main(n)) for n in range(5)] == [1, 2, 3, 4, 5]
    assert len(app._sessions) <= 1


def test_threads_that_begin_at_once_share_one_store(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[MemoryBroker] = []

    def create(url: str, *, prefix: str) -> MemoryBroker:
        time.sleep(0.05)  # so that the others come in between
        made.append(MemoryBroker(url, prefix=prefix))
        return made[-1]

    monkeypatch.setattr("aiotaskq.app.create_broker", create)
    app = TaskQueue("t", broker="memory://")
    with ThreadPoolExecutor(8) as pool:
        for driver in [pool.submit(app.drivers) for _ in range(8)]:
            driver.result(120)
    assert len(made) == 1


def test_one_application_serves_many_threads_at_once() -> None:
    app = TaskQueue("t", broker="memory://")
    task = app.task(add)
    together = threading.Barrier(8)

    def work(n: int) -> list[int]:
        together.wait(120)  # so that all of them create the drivers at the same moment

        async def main() -> list[int]:
            handles = [await task.kiq(n, m) for m in range(20)]
            return [await handle.result(120) for handle in handles]

        return asyncio.run(main())

    async def serve(stop: Callable[[], bool]) -> None:
        async with app.worker():
            while not stop():
                await asyncio.sleep(0.005)

    with ThreadPoolExecutor(9) as pool:
        results = [pool.submit(work, n) for n in range(8)]
        pool.submit(asyncio.run, serve(lambda: all(r.done() for r in results)))
        for n, result in enumerate(results):
            assert result.result(120) == [n + m for m in range(20)]


async def test_concurrent_calls_share_round_trips() -> None:
    class Counting(MemoryBroker):
        calls = 0

        async def publish(self, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return await super().publish(*args, **kwargs)

    async with TaskQueue("t", broker=Counting()) as app:
        await asyncio.gather(*[app.send("x") for _ in range(500)])
        assert len(await waiting(app)) == 100
        assert Counting.calls <= 5
        Counting.calls = 0
        await app.kiq_many([app.task(add).s(1, 2) for _ in range(500)])
        assert Counting.calls == 1


# --- the rest -----------------------------------------------------------------------------------


async def test_lifespans_surround_the_tasks_and_end_in_reverse(app: TaskQueue) -> None:
    notes: list[str] = []

    @app.lifespan
    async def outer(state: State) -> AsyncIterator[None]:
        state.pool = "pool"
        notes.append("outer begins")
        yield
        notes.append("outer ends")

    @app.on_startup
    async def begin(state: State) -> None:
        notes.append(f"startup with {state.pool}")

    @app.on_shutdown
    async def end(state: State) -> None:
        notes.append("shutdown")

    @app.task
    async def use() -> str:
        with pytest.raises(AttributeError, match="lifespan"):
            _ = current_task().state.cache
        return str(current_task().state.pool)

    async with app.worker():
        assert await (await use.kiq()).result(120) == "pool"
    assert notes == ["outer begins", "startup with pool", "shutdown", "outer ends"]


def test_there_is_no_current_task_outside_one() -> None:
    with pytest.raises(RuntimeError, match="no task runs here"):
        current_task()


async def test_a_serializer_that_would_be_refused_is_refused_at_once() -> None:
    app = TaskQueue("t", broker="memory://", task_serializer="pickle")
    async with app:
        with pytest.raises(ConfigError, match="accept_content"):
            await app.send("x")


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError):
        TaskQueue("t", brokr="memory://")


def test_a_repr_shows_no_more_than_needed() -> None:
    app = TaskQueue("t", broker="redis://:secret@localhost/0")
    assert repr(app) == "<TaskQueue t with 0 tasks>"
    assert repr(app.handle("1")) == "<TaskHandle: 1>"
    assert repr(app.AsyncResult("1")) == "<AsyncResult: 1>"
