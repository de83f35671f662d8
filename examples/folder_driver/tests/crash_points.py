"""Kills of a process at each step of each operation, and the state that they leave.

``python crash_points.py FOLDER`` prints how many points each operation has. A child does the
operation and is killed before its first step in the file system, another one before the second
step, and so on, until one gets to the end. Each time the store must be as it was before the
operation, or as it is after it; the next who uses it must not be stopped; and the same call, made
again, must lead to the same end.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

from aiotaskq_folder import FolderBackend, FolderBroker
from aiotaskq_folder.consumer import FolderConsumer
from msgspec import Raw

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.records import Maintained, StoredSchedule
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement

# What Python tells of before it does it.
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.utime", "fcntl.flock"}
SCHEDULE = StoredSchedule(id="s", body=b"", due_at=1.0, revision="1")


class Scene:
    """A store in which there is something of everything."""

    def __init__(self, folder: Path) -> None:
        self.broker = FolderBroker(f"folder://{folder}?fsync=false")
        self.backend = FolderBackend(f"folder://{folder}?fsync=false")
        self.consumer: FolderConsumer
        self.held: list[Delivery] = []

    async def make(self) -> None:
        await self.broker.open()
        await self.backend.open()
        await self.broker.publish([envelope("buried")])
        self.consumer = self.broker.consumer(["q"], name="dies", lease=600.0)
        await self.consumer.open()
        [buried] = await self.consumer.fetch(1, 0)
        await self.consumer.settle([Dead(buried, "why")])
        await self.broker.publish([envelope(one) for one in "abcdef"])
        self.held = list(await self.consumer.fetch(4, 0))
        await self.close()

    async def close(self) -> None:
        await self.broker.close()
        await self.backend.close()

    async def seen(self) -> object:
        """Return the state as another process sees it; it takes all messages."""
        while await self.broker.maintain() != Maintained():
            pass
        depth = dict(await self.broker.depth())
        other = self.broker.consumer(["q", "p"], name="looks", lease=600.0)
        await other.open()
        got = [(one.id, one.queue, one.crashes) for one in await other.fetch(100, 0)]
        dead = [one.id for one in await self.broker.dead("q")]
        schedules = list(await self.broker.schedules().load())
        results = sorted(await self.backend.load(["a", "b"]))
        refused = list(await self.broker.publish([envelope("once", unique=True)]))
        await other.close()
        await self.close()
        return depth, got, dead, schedules, results, refused


Operation: TypeAlias = Callable[[Scene], Awaitable[Any]]


def envelope(name: str, **fields: Any) -> Envelope:
    return Envelope(**{"id": name, "queue": "q", "body": b"body", **fields})


async def publish(scene: Scene) -> None:
    batch = [envelope("once", unique=True), envelope("x", queue="p"), envelope("y", delay=600.0)]
    await scene.broker.publish(batch, call_id="call")


async def settle(scene: Scene) -> None:
    a, b, c, d = scene.held
    again = envelope("a", queue="p")
    batch: list[Settlement] = [Again(a, again), Dead(b, "why"), Release(c), Done(d)]
    await scene.consumer.settle(batch)


async def revive(scene: Scene) -> None:
    letters = await scene.broker.dead("q")
    await scene.broker.revive("q", [(one.key, envelope("once", unique=True)) for one in letters])


async def swap(scene: Scene) -> None:
    batch = [envelope("run 1"), envelope("run 2", queue="p")]
    await scene.broker.schedules().compare_and_swap("s", None, SCHEDULE, batch)


async def store(scene: Scene) -> None:
    outcome = Outcome(task_id="a", status=TaskStatus.SUCCESS, result=Raw(b"1"))
    await scene.backend.store([outcome], 60.0)


OPERATIONS: dict[str, Operation] = {
    "publish": publish,
    "settle": settle,
    "revive": revive,
    "compare_and_swap": swap,
    "store": store,
    "cancel": lambda scene: scene.broker.cancel(["e", "f"]),
    "end": lambda scene: scene.broker.lease(scene.consumer.grant).end("killed"),
    "close": lambda scene: scene.consumer.close(),
    "purge": lambda scene: scene.broker.purge("q"),
}
BY_AND_BY = {"purge"}  # each message by itself


def killed_at(point: int, scene: Scene, operation: Operation) -> bool:
    """Do an operation in a child that is killed at a step; return whether it came to that."""
    child = os.fork()
    if child == 0:
        count = itertools.count(1)

        def watch(event: str, _: object) -> None:
            if event in STEPS and next(count) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        async def go() -> None:
            sys.addaudithook(watch)
            await operation(scene)

        asyncio.run(go())
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def seen_after(folder: Path, operation: Operation, *, point: int, again: bool) -> object:
    """Return the state after an operation was killed at a point; None if it got to its end."""
    shutil.rmtree(folder, ignore_errors=True)
    scene = Scene(folder)
    asyncio.run(scene.make())
    if not killed_at(point, scene, operation):
        return None

    async def look() -> object:
        if again:
            await operation(scene)
        return await scene.seen()

    return asyncio.run(look())


def try_all(folder: Path, name: str, operation: Operation) -> int:
    """Kill at each point of an operation; return how many there are."""
    before = seen_after(folder, operation, point=1, again=False)
    after = seen_after(folder, operation, point=1, again=True)
    assert before != after
    for point in itertools.count(2):
        seen = seen_after(folder, operation, point=point, again=False)
        if seen is None:
            return point - 1
        told = f"{name}, killed at step {point}:\n{seen}\nis neither\n{before}\nnor\n{after}"
        assert name in BY_AND_BY or seen in (before, after), told
        # Whoever does not know whether it was done makes the same call again.
        seen = seen_after(folder, operation, point=point, again=True)
        assert seen == after, f"{name}, killed at step {point} and repeated:\n{seen}\n{after}"
    raise AssertionError("never")


if __name__ == "__main__":
    for name, operation in OPERATIONS.items():
        print(name, try_all(Path(sys.argv[1]) / "store", name, operation), flush=True)
