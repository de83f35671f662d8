"""The application of the workers, with settings from the environment, as for any application.

The sender gives each task a `key` of its own; the task records each of its runs in the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from aiotaskq import Retry, TaskQueue, current_task, events
from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.message import Delivery
from aiotaskq.contract.results import ResultBackend
from aiotaskq.contract.settlement import Again, Done, Settlement
from tests.faults.ledger import Down, Ended, Fault, Said, Started, Up, Writer

FOLDER = Path(os.environ.get("AIOTASKQ_TESTS_FAULTS_LEDGER", "."))
DIE = os.environ.get("AIOTASKQ_TESTS_FAULTS_DIE", "")
"""``point:times,...``: kill a process at a point, that many times in all processes together.

Points: ``fetch``, ``store``, ``settle``, after such a call; ``received``, ``started``,
``succeeded``, at the events of these names.
"""
LOSSY = os.environ.get("AIOTASKQ_TESTS_FAULTS_LOSSY") == "1"

ledger = Writer(FOLDER, "worker")


class Planned(Exception):
    """A failure on purpose."""


class Tested(TaskQueue):
    """An application whose process may die at a point, or that settles before it runs."""

    def drivers(self) -> tuple[Broker, ResultBackend | None]:
        broker, backend = super().drivers()
        if DIE or LOSSY:
            make = broker.consumer

            def consumer(*given: Any, **more: Any) -> Consumer:
                made = make(*given, **more)
                return cast("Consumer", Lossy(made, broker)) if LOSSY else dying(made)

            broker.consumer = consumer  # type: ignore[method-assign]
            if backend is not None and "store" in _DIES:
                after(backend, "store")
        return broker, backend


_DIES = {
    point: int(times) for one in DIE.split(",") for point, _, times in [one.partition(":")] if times
}


def die_at(point: str) -> None:
    """Kill this process, unless that has happened often enough at this point."""
    if any(once(f"died-{point}-{number}") for number in range(_DIES.get(point, 0))):
        be_killed(f"dies at {point}")


def once(name: str) -> bool:
    """Return whether this is the first call with this name in all processes."""
    try:
        (FOLDER / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def be_killed(kind: str) -> None:
    """Kill this process at once, with everything that it runs."""
    now = time.monotonic()
    ledger.write(Fault(at=now, kind=kind, pids=(os.getpid(),), until=now))
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # no further step is taken


def after(driver: object, method: str) -> None:
    """Let the process die after a call of this method that had an effect."""
    inner = getattr(driver, method)

    async def call(*given: Any, **more: Any) -> Any:
        reply = await inner(*given, **more)
        if method != "fetch" or reply:
            die_at(method)
        return reply

    setattr(driver, method, call)


def dying(consumer: Consumer) -> Consumer:
    after(consumer, "fetch")
    after(consumer, "settle")
    return consumer


class Lossy:
    """A consumer that settles messages before they run, which are lost if it dies.

    It is the control: the checker has to find the loss.
    """

    def __init__(self, inner: Consumer, broker: Broker) -> None:
        self._inner = inner
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        taken = await self._inner.fetch(limit, wait, order=order)
        await self._inner.settle([Done(delivery) for delivery in taken])
        return taken

    async def settle(self, batch: Sequence[Settlement]) -> Collection[Delivery]:
        again = [one.envelope for one in batch if isinstance(one, Again)]
        if again:
            await self._broker.publish(again)
        return ()


app = Tested("faults")


# --- records of workers --------------------------------------------------------------------------


def _say(event: events.Event) -> None:
    facts = {name: getattr(event, name) for name in event.__struct_fields__ if name != "message"}
    message = getattr(event, "message", None)
    about = message.id if message is not None else str(facts.get("task_id", ""))
    note = repr({name: str(value)[:200] for name, value in facts.items()})
    ledger.write(Said(pid=os.getpid(), event=type(event).__name__, about=about, note=note))


for _name in ("Refused", "Buried", "Released", "Revoked", "Stuck", "LoopBlocked", "HealthChanged"):
    app.observers.add(getattr(events, _name), _say)


def _up(event: events.WorkerReady) -> None:
    ledger.write(Up(pid=os.getpid(), worker=event.worker))


def _down(event: events.WorkerStopped) -> None:
    ledger.write(Down(pid=os.getpid(), worker=event.worker))


app.observers.add(events.WorkerReady, _up)
app.observers.add(events.WorkerStopped, _down)
if "received" in _DIES:
    app.observers.add(events.Received, lambda _: die_at("received"))
if "started" in _DIES:
    app.observers.add(events.Started, lambda _: die_at("started"))
if "succeeded" in _DIES:
    app.observers.add(events.Succeeded, lambda _: die_at("succeeded"))


# --- tasks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def run(key: str) -> Iterator[int]:
    """Record the beginning and the end of a run; yield the number of the attempt."""
    task = current_task()
    facts: dict[str, Any] = {"key": key, "task_id": task.id, "attempt": task.attempt}
    facts["pid"] = os.getpid()
    book = ledger  # read now: a thread may outlive its worker, and its test
    book.write(Started(task=re.sub(r".*\.", "", task.name), **facts))
    how = "returned"
    try:
        yield task.attempt
    except BaseException as error:
        how = type(error).__name__
        raise
    finally:
        book.write(Ended(how=how, **facts))


@app.task
async def quick(key: str, seconds: float = 0.0) -> str:
    """Sleep for some seconds."""
    with run(key):
        await asyncio.sleep(seconds)
        return key


@app.task
async def again(key: str, seconds: float) -> str:
    """Sleep at the first run, and return at once at later ones."""
    with run(key):
        await asyncio.sleep(seconds if once(f"again-{key}") else 0.0)
        return key


@app.task
def thread(key: str, seconds: float = 0.0) -> str:
    """Sleep in a thread, which cannot be cancelled."""
    with run(key):
        time.sleep(seconds)
        return key


@app.task(executor="process")
def process(key: str, seconds: float = 0.0) -> str:
    """Sleep in a process of the pool."""
    with run(key):
        time.sleep(seconds)
        return key


@app.task(retry=Retry(max_attempts=5, delay=0.1, backoff="constant"))
async def flaky(key: str, failures: int = 2) -> str:
    """Fail at the first attempts."""
    with run(key) as attempt:
        await asyncio.sleep(0)
        if attempt <= failures:
            raise Planned(f"attempt {attempt}")
        return key


@app.task
async def failing(key: str) -> None:
    """Fail, without another attempt."""
    with run(key):
        raise Planned("as it was asked to")


@app.task
async def blocking(key: str, seconds: float) -> str:
    """Block the event loop, without holding the interpreter's lock."""
    with run(key):
        time.sleep(seconds)
        return key


@app.task
def hogging(key: str, seconds: float) -> str:
    """Hold the interpreter's lock in C code: no other thread of the process runs."""
    with run(key):
        hold = ctypes.PyDLL(None).usleep  # PyDLL keeps the lock during the call
        hold.argtypes = [ctypes.c_uint]
        hold(int(seconds * 1e6))
        return key


@app.task
async def poison(key: str) -> None:
    """Kill the worker."""
    with run(key):
        be_killed("poison")


@app.task(executor="process")
def crash(key: str, how: str) -> None:
    """Kill the process of the pool."""
    with run(key):
        if how == "segfault":
            ctypes.string_at(0)
        elif how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)


@app.task(timeout=0.5)
async def swallower(key: str, seconds: float) -> str:
    """Ignore cancellation."""
    with run(key):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)
        return key


@app.task(timeout=0.5)
def deaf(key: str, seconds: float) -> str:
    """Sleep in a thread for longer than the timeout."""
    with run(key):
        time.sleep(seconds)
        return key


class Hostile(Exception):
    """An error that cannot be shown."""

    def __str__(self) -> str:
        raise Planned("no text for you")

    __repr__ = __str__


def _hostile_value() -> object:
    return type("Odd", (), {"__repr__": Hostile.__str__})()


_HOSTILE: dict[str, Callable[[], object]] = {
    "unencodable": lambda: object(),
    "lambda": lambda: lambda: None,
    "odd": _hostile_value,
    "huge": lambda: "x" * 5_000_000,
    "deep": lambda: _deep(5_000),
}


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@app.task
async def hostile(key: str, what: str) -> Any:
    """Return or raise something that is hard to store."""
    with run(key):
        if what == "raise-hostile":
            raise Hostile
        if what == "raise-huge":
            raise Planned("y" * 5_000_000)
        if what == "raise-exit":
            raise SystemExit(7)
        if what == "raise-local":
            raise type("Local", (Exception,), {})(object(), lambda: None)
        return _HOSTILE[what]()
