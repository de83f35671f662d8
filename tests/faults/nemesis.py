"""The nemesis: faults by a seeded schedule.

The seed alone determines the schedule: the kind of each fault, the pause before it, and the number
by which a victim is chosen among the candidates. The pid of the victim differs from run to run,
and is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TypeAlias

import psutil

from tests.faults.fleet import Fleet, Program, lives, pids_of
from tests.faults.ledger import Fault, Writer

Action: TypeAlias = Callable[[random.Random], Awaitable[bool]]
"""A function that strikes once, and returns False if there was no victim."""


class Nemesis:
    """Strikes by a schedule, and records the victims.

    Args:
        seed: Of all random choices.
        ledger: The folder of the ledger, for the faults.
        fleet: The processes that may be hit.

    Attributes:
        spared: Programs that are never hit.
    """

    def __init__(self, seed: int, ledger: Writer, fleet: Fleet) -> None:
        self.random = random.Random(seed)
        self.spared: list[Program] = []
        self._ledger = ledger
        self._fleet = fleet

    # --- the schedule ---

    async def run(
        self,
        actions: Sequence[Action],
        *,
        times: int | None = None,
        seconds: float | None = None,
        every: tuple[float, float] = (0.3, 1.0),
    ) -> int:
        """Strike a number of times, or for some time; return the number of hits.

        Args:
            actions: Each time, one of these is chosen.
            times: The number of hits.
            seconds: The time, in place of `times`.
            every: The shortest and the longest pause before each.
        """
        end = None if seconds is None else time.monotonic() + seconds
        hit = 0
        while (times is None or hit < times) and (end is None or time.monotonic() < end):
            pause, action = self.random.uniform(*every), self.random.choice(list(actions))
            chosen = random.Random(self.random.getrandbits(64))
            await asyncio.sleep(pause)
            hit += await action(chosen)
        return hit

    # --- for actions ---

    def strike(
        self, kind: str, pids: Sequence[int] = (), *, seconds: float = 0.0, note: str = ""
    ) -> None:
        """Record a fault, before it happens.

        Args:
            kind: The kind of fault.
            pids: The processes whose runs it may cut short; empty: any run.
            seconds: Its duration.
            note: For people.
        """
        now = time.monotonic()
        fault = Fault(at=now, kind=kind, pids=tuple(pids), until=now + seconds, note=note)
        self._ledger.write(fault)

    @contextlib.contextmanager
    def lasting(self, kind: str, pids: Sequence[int] = (), note: str = "") -> Iterator[None]:
        """Record a fault at its end, with its duration."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._ledger.write(
                Fault(at=begun, kind=kind, pids=tuple(pids), until=time.monotonic(), note=note)
            )

    # --- actions on processes ---

    def kill_worker(self) -> Action:
        """Kill a worker process, whose supervisor notices it."""

        async def act(chosen: random.Random) -> bool:
            victim = self._victim(chosen)
            if victim is not None:
                self.strike("kill", pids_of(victim))
                victim.kill()
            return victim is not None

        return act

    def kill_helper(self) -> Action:
        """Kill a child of a supervisor that takes no tasks: a starting one, or the lease keeper."""

        async def act(chosen: random.Random) -> bool:
            program = self._program(chosen)
            workers = {process.pid for process in self._fleet.workers()}
            family = [] if program is None else program.family()
            program_pid = 0 if program is None else program.pid
            helpers = [
                process
                for process in family
                if process.pid not in workers and process.ppid() == program_pid
            ]
            if helpers:
                victim = chosen.choice(helpers)
                self.strike("kill helper", pids_of(victim))
                victim.kill()
            return bool(helpers)

        return act

    def kill_program(self, *options: str, processes: int = 1) -> Action:
        """Kill a supervisor, and start another program in its place."""

        async def act(chosen: random.Random) -> bool:
            program = self._program(chosen)
            if program is not None:
                family = program.family()
                self.strike("kill supervisor", [process.pid for process in family])
                program.signal(signal.SIGKILL)
                await self._fleet.worker(*options, processes=processes)
            return program is not None

        return act

    def replace_program(self, *options: str, processes: int = 1) -> Action:
        """Stop a program in order and start another one in its place, as a deployment does."""

        async def act(chosen: random.Random) -> bool:
            program = self._program(chosen)
            if program is not None:
                await self._fleet.worker(*options, processes=processes)
                with self.lasting("deploy", [process.pid for process in program.family()]):
                    await self._fleet.stop(program)
            return program is not None

        return act

    def freeze_worker(self, seconds: tuple[float, float]) -> Action:
        """Freeze a worker process for a while; the rest of its program goes on."""

        async def act(chosen: random.Random) -> bool:
            victim = self._victim(chosen)
            if victim is not None:
                await self.freeze([victim], chosen.uniform(*seconds))
            return victim is not None

        return act

    def freeze_program(self, seconds: tuple[float, float]) -> Action:
        """Freeze all processes of a program for a while."""

        async def act(chosen: random.Random) -> bool:
            program = self._program(chosen)
            if program is not None:
                await self.freeze(program.family(), chosen.uniform(*seconds))
            return program is not None

        return act

    async def freeze(self, processes: Sequence[psutil.Process], seconds: float) -> None:
        """Freeze these processes for some seconds."""
        async with self.frozen(processes):
            await asyncio.sleep(seconds)

    @contextlib.asynccontextmanager
    async def frozen(self, processes: Sequence[psutil.Process]) -> AsyncIterator[None]:
        """Freeze these processes, and let them go on at the end."""
        pids = [pid for process in processes for pid in pids_of(process)]
        with self.lasting("freeze", pids):
            try:
                for process in processes:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.suspend()
                yield
            finally:
                for process in reversed(processes):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.resume()

    def _victim(self, chosen: random.Random) -> psutil.Process | None:
        workers = [
            process
            for program in self._programs()
            for process in self._fleet.workers(program)
            if lives(process)
        ]
        return chosen.choice(workers) if workers else None

    def _program(self, chosen: random.Random) -> Program | None:
        running = self._programs()
        return chosen.choice(running) if running else None

    def _programs(self) -> list[Program]:
        return [
            program
            for program in self._fleet.programs
            if program.name.startswith("worker") and program.running and program not in self.spared
        ]
