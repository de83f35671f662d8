"""Demonstration with the default store, an SQLite file, and no server: `make demo`.

It starts a worker process in a temporary folder, sends tasks, prints the results, and stops the
worker.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiotaskq import TaskQueue

TIMEOUT = 60  # seconds to wait for a result; the machine may be busy
SHOWN = 20  # lines of the worker's output

app = TaskQueue("demo")


@app.task
async def add(x: int, y: int) -> int:
    return x + y


@app.task
def shout(text: str) -> str:
    return text.upper()


@app.task
async def divide(x: float, y: float) -> float:
    return x / y


@contextmanager
def worker(log: Path) -> Iterator[None]:
    """Run a worker process, and stop it in the end in any case."""
    command = [sys.executable, "-m", "aiotaskq", "worker", "demo:app"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        lines = log.read_text().splitlines()
        print("\nWhat the worker printed:\n")
        print("\n".join(f"  {line}" for line in lines[:SHOWN]))
        print(f"  ... and {max(len(lines) - SHOWN, 0)} lines more\n")
    if status != 0:
        raise SystemExit(f"The worker ended with status {status}")
    print("The worker was told to stop, and ended with status 0.")


async def from_async_code() -> None:
    async with app:
        handle = await add.kiq(2, 8)
        show("await add.kiq(2, 8)", await handle.result(timeout=TIMEOUT))

        begin = time.perf_counter()
        handles = await app.kiq_many([add.s(n, n) for n in range(100)])
        values = await asyncio.gather(*(handle.result(timeout=TIMEOUT) for handle in handles))
        took = time.perf_counter() - begin
        show("await app.kiq_many([... 100 calls])", f"a sum of {sum(values):,} in {took:.2f} s")

        handle = await add.with_options(countdown=1).kiq(1, 1)
        show("with_options(countdown=1)", await handle.result(timeout=TIMEOUT))

        failing = await divide.kiq(1, 0)
        try:
            await failing.result(timeout=TIMEOUT)
        except ZeroDivisionError as error:
            show("await divide.kiq(1, 0)", f"is caught as ZeroDivisionError: {error}")


def from_plain_code() -> None:
    result = shout.delay("from plain code")
    show('shout.delay("from plain code")', repr(result.get(timeout=TIMEOUT)))
    show("its status", result.status)


def show(call: str, value: object) -> None:
    print(f"  {call:<36} {value}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="aiotaskq-demo-") as folder:
        os.chdir(folder)  # the default store is the file aiotaskq.db in the working folder
        print(f"A worker process and this one share {folder}/aiotaskq.db.\n")
        with worker(Path(folder) / "worker.log"):
            asyncio.run(from_async_code())
            from_plain_code()


if __name__ == "__main__":
    main()
