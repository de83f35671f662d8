"""Workers with leases to look after: a folder with tasks, a broker, and worker programs."""

from __future__ import annotations

import asyncio

from aiotaskq.contract.records import DeadLetter
from aiotaskq.drivers import create_broker
from tests.integrations.programs import LONG, TASKS, Program, Programs

FOREVER = 100 * LONG  # seconds


MORE_TASKS = """
import re
from pathlib import Path

def once(name: str) -> bool:
    try:
        Path(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

@app.task
async def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)

@app.task
async def hold(seconds: float) -> int:
    print("holding", os.getpid(), flush=True)
    began = time.perf_counter()
    sum(range(10**7))
    rate = 10**7 / (time.perf_counter() - began)
    sum(range(int(rate * seconds)))  # one call of C code, which lets no other thread run
    print("held", flush=True)
    return os.getpid()

@app.task
async def block() -> int:
    print("blocking", os.getpid(), flush=True)
    if once("blocked"):
        time.sleep(3600)
    return os.getpid()

@app.task
async def swell(seconds: float) -> int:
    print("swelling", os.getpid(), flush=True)
    memory = bytearray(os.urandom(1024)) * 300_000
    await asyncio.sleep(seconds)
    return os.getpid()

@app.task(timeout=0.2)
async def stubborn() -> None:
    print("stubborn", os.getpid(), flush=True)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass
"""


class Site:
    """A folder with tasks, and a broker."""

    def __init__(self, programs: Programs, url: str) -> None:
        self.programs = programs
        self.url = url

    def worker(
        self, count: int, *arguments: str, lease: float = FOREVER, **options: object
    ) -> Program:
        """Start a worker of so many processes and wait until all are ready.

        Args:
            count: The processes.
            arguments: More words of the command line.
            lease: Seconds.
            options: Other settings of the application.
        """
        beat = min(lease / 5, 0.5)
        options = {"worker_lease": lease, "worker_heartbeat": beat, **options}
        settings = "".join(f", {name}={value!r}" for name, value in options.items())
        self.programs.write("tasks.py", TASKS.format(options=settings) + MORE_TASKS)
        program = self.programs.worker(
            "tasks:app", "-w", str(count), *arguments, AIOTASKQ_BROKER_URL=self.url
        )
        program.line(r" ready$", times=count)
        program.worker_pids(count)
        return program

    def call(self, *arguments: str) -> str:
        done = self.programs.run("call", "tasks:app", *arguments, AIOTASKQ_BROKER_URL=self.url)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def result(self, task_id: str) -> str:
        done = self.programs.run(
            "result", "tasks:app", task_id, "--timeout", str(LONG), AIOTASKQ_BROKER_URL=self.url
        )
        return done.stdout.strip() or done.stderr.strip()

    def dead(self) -> list[DeadLetter]:
        broker = create_broker(self.url, prefix="aiotaskq")

        async def look() -> list[DeadLetter]:
            await broker.open()
            try:
                return list(await broker.dead("default"))
            finally:
                await broker.close()

        return asyncio.run(look())
