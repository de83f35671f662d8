"""The scene of a test: broker, workers, producers, nemesis, observer and checker together."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from aiotaskq import TaskQueue
from tests.faults.checker import Allowed, Facts, Verdict, check
from tests.faults.fleet import Fleet, Program, pids_of
from tests.faults.ledger import (
    Acknowledged,
    Ended,
    Fault,
    Finished,
    Ledger,
    Line,
    Started,
    Up,
    Writer,
)
from tests.faults.nemesis import Nemesis
from tests.faults.observer import (
    Observer,
    postgres_leftovers,
    redis_leftovers,
    sqlite_leftovers,
)
from tests.faults.producer import Plan, Some
from tests.servers import Watchdog

LEASE = 3.0  # seconds
BEAT = 0.5
LONG_PROFILE = os.environ.get("AIOTASKQ_TESTS_FAULTS") == "long"
# Seconds until a queue that must drain has failed to.
PATIENCE = 300.0 if LONG_PROFILE else 180.0
ONE_BROKER = ["sqlite", "redis"] if LONG_PROFILE else ["sqlite"]
"""Runs a test on one broker: it depends little on brokers, or takes long."""


def scaled(smoke: float, long: float) -> Any:
    """Return the number for the current profile."""
    return long if LONG_PROFILE else smoke


def choose_seed() -> int:
    """Return the seed of the environment, otherwise a new one each time."""
    given = os.environ.get("AIOTASKQ_TESTS_FAULTS_SEED")
    if given is not None:
        return int(given)
    return random.SystemRandom().randrange(2**31)


class Scene:
    """A broker, its workers and producers, faults, and the check of the history.

    Args:
        broker: Its URL.
        backend: The URL of the result backend; None: the broker's own store.
        folder: An empty folder, for the ledger and the logs.
        seed: Of all random choices.
        watchdog: Ends the processes if the tests are killed.
        settings: Of the application, beside a short lease.
    """

    def __init__(
        self,
        broker: str,
        *,
        backend: str | None = None,
        folder: Path,
        seed: int,
        watchdog: Watchdog,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.seed = seed
        self.lease = LEASE
        self.broker = broker
        self.backend = backend
        self.folder = folder
        self.ledger = Ledger(folder)
        self.writer = Writer(folder, "scene")
        self.fleet = Fleet(folder, self.ledger, watchdog)
        self.fleet.more = {
            "AIOTASKQ_TESTS_FAULTS_LEDGER": str(folder),
            "AIOTASKQ_BROKER_URL": broker,
            "AIOTASKQ_WORKER_LEASE": str(LEASE),
            "AIOTASKQ_WORKER_HEARTBEAT": str(BEAT),
            **({} if backend is None else {"AIOTASKQ_RESULT_BACKEND": backend}),
            **(settings or {}),
        }
        self.nemesis = Nemesis(seed, self.writer, self.fleet)
        self.app = TaskQueue("observer", broker=broker, backend=backend)
        self.observer = Observer(self.app, self.ledger, self.writer)
        self._watching: asyncio.Task[None] | None = None
        self._producers: list[Program] = []
        self._sent = -1
        self.drained: float | None = None

    async def open(self) -> None:
        await self.observer.open()
        self._watching = asyncio.create_task(self.observer.watch())

    async def close(self) -> None:
        await self._rest()
        self.fleet.close()
        await self.observer.close()
        await self.app.close()

    async def _rest(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None

    def set(self, **settings: object) -> None:
        """Change settings of the application, for programs that start later."""
        self.lease = float(str(settings.get("worker_lease", self.lease)))
        for name, value in settings.items():
            self.fleet.more[f"AIOTASKQ_{name.upper()}"] = str(value)

    def producer(
        self, *tasks: Some, rate: float = 200.0, skew: str | None = None, **more: Any
    ) -> Program:
        """Start a producer of these tasks, perhaps with a clock that is wrong by `skew` seconds."""
        number = self._sent = self._sent + 1
        more.setdefault("own_ids", not self.broker.startswith("amqp"))  # which lacks that trait
        plan = Plan(
            name=f"p{number}", seed=self.seed + number, tasks=list(tasks), rate=rate, **more
        )
        given = msgspec.json.encode(plan).decode()
        if skew is None:
            program = self.fleet.start("producer", "tests.faults.producer", given)
        else:
            program = self.fleet.start(
                "producer",
                "tests.faults.skewed",
                "producer",
                given,
                AIOTASKQ_TESTS_FAULTS_SKEW=skew,
            )
        self._producers.append(program)
        return program

    def mix(self, count: int) -> list[Some]:
        """Return the usual mix of tasks, `total` in all."""
        few = max(1, count // 50)
        return [
            Some("quick", count - 5 * few, {"seconds": [0.0, 0.05]}),
            Some("quick", few, {"seconds": 1.0}),
            Some("thread", 2 * few, {"seconds": [0.0, 0.05]}),
            Some("flaky", 2 * few, {"failures": 1}),
        ]

    async def sent(self) -> None:
        """Wait until all producers have sent all their tasks."""
        for program in self._producers:
            status = await program.wait(PATIENCE)
            assert status == 0, f"{program.name} ended with {status}:\n{program.output[-5000:]}"
        finished = {line.pid for line in self.ledger.of(Finished)}
        assert finished == {program.pid for program in self._producers}

    async def drain(self, within: float = PATIENCE) -> None:
        """Wait until all tasks have ended; `check` reports those that have not."""
        await self.sent()
        wanted = {line.task_id for line in self.ledger.of(Acknowledged)}
        self.drained = await self.observer.drained(wanted, within)

    async def until_logged(self, program: Program, text: str) -> None:
        """Wait until a program has logged a text."""
        end = time.monotonic() + PATIENCE
        while text not in program.output:
            assert program.running, f"{program.name} ended:\n{program.output[-5000:]}"
            assert time.monotonic() < end, f"{program.name} never logged {text!r}"
            await asyncio.sleep(0.02)

    async def until_anybody_logged(self, text: str, within: float) -> None:
        """Wait until one of the programs has logged a text."""
        end = time.monotonic() + within
        while not any(text in program.output for program in self.fleet.programs):
            assert time.monotonic() < end, f"nobody logged {text!r}"
            await asyncio.sleep(0.05)

    async def freeze_and_start(self, processes: Sequence[psutil.Process], *options: str) -> Program:
        """Freeze processes until a new worker has begun all their tasks; return that worker."""
        pids = {pid for process in processes for pid in pids_of(process)}
        held = {line.key for line in self.ledger.of(Started) if line.pid in pids}
        held -= {line.key for line in self.ledger.of(Ended)}

        def begun(lines: Iterable[Line]) -> bool:
            return held <= {
                line.key for line in lines if isinstance(line, Started) and line.pid not in pids
            }

        async with self.nemesis.frozen(processes):
            program = await self.fleet.worker(*options)
            await self.ledger.until(begun, "others began what they held", within=PATIENCE)
        return program

    async def judge(self, allowed: Allowed | None = None, *, alive: Sequence[str] = ()) -> Verdict:
        """Return the verdict on the history so far; workers may go on."""
        facts = Facts(
            lines=self.ledger.refresh(),
            lease=self.lease,
            outcomes=await self.observer.finals(self.app),
            letters=await self.observer.letters(),
            waiting=await self.observer.waiting(),
            drained=self.drained,
            leftovers=[] if self._left() else await self._leftovers(),
            logs={program.name: program.output for program in self.fleet.programs},
            alive=alive,
        )
        return check(facts, allowed)

    async def verdict(self, allowed: Allowed | None = None) -> Verdict:
        """Stop all workers, and return the verdict."""
        await self._rest()
        await self.fleet.stop(*self._left())
        return await self.judge(allowed, alive=await self.fleet.all_gone(within=30.0))

    def forget(self) -> None:
        """Forget the history that was checked: a long test goes on without it."""
        self.ledger.forget(Up)
        self.observer.forget()
        self._producers.clear()
        self.fleet.forget()
        self.drained = None

    async def check(self, allowed: Allowed | None = None) -> Verdict:
        """Stop all workers, and fail if there are problems."""
        verdict = await self.verdict(allowed)
        assert not verdict.problems, f"{self.told()}\n{verdict}"
        print(f"{self.told()}\n{verdict}")  # noqa: T201 - shown with -s, and when the test fails
        return verdict

    def told(self) -> str:
        """Return the command that repeats the test, and the faults."""
        faults = self.ledger.of(Fault)
        first = self.ledger.lines[0].at if self.ledger.lines else time.monotonic()
        struck = "\n".join(
            f"  {fault.at - first:7.2f} {fault.kind} {list(fault.pids)} {fault.note}"
            f" for {fault.until - fault.at:.2f} s"
            for fault in faults
        )
        return f"AIOTASKQ_TESTS_FAULTS_SEED={self.seed}, {self.broker}, {self.folder}\n{struck}"

    def _left(self) -> Sequence[Program]:
        return [
            program
            for program in self.fleet.programs
            if program.name.startswith("worker") and program.running
        ]

    async def _leftovers(self) -> list[str]:
        """Return what is left after the last lease has lapsed and `maintain` was called."""
        end = time.monotonic() + 2 * self.lease + 5.0
        while (found := await self._look_for_leftovers()) and time.monotonic() < end:
            await self.observer.broker.maintain()
            await asyncio.sleep(0.1)
        return found

    async def _look_for_leftovers(self) -> list[str]:
        if self.broker.startswith("postgresql"):
            return await postgres_leftovers(self.broker)
        if self.broker.startswith("sqlite"):
            return sqlite_leftovers(Path(self.broker.removeprefix("sqlite:///")))
        if self.broker.startswith("amqp"):  # its queues stay, and were checked to be empty
            assert self.backend is not None
            return redis_leftovers(self.backend)
        return redis_leftovers(self.broker)
