"""Commands of every `bench.py`.

- ``prepare``: create the tables of an empty store.
- ``fill WORKLOAD COUNT``: store tasks in the fastest way that the library has; prints the seconds.
- ``worker WORKLOAD``: run a worker until it is killed.
- ``enqueue CALLERS COUNT``: send tasks one by one from concurrent callers; prints the seconds.
- ``bulk COUNT``: send tasks in batches of 1,000; prints the seconds, or that this is unsupported.
- ``roundtrip COUNT``: send a task and wait for its result, one at a time; prints the milliseconds.

An answer is one line of JSON. The servers are in `BENCH_REDIS_URL`, `BENCH_POSTGRES_URL` and
`BENCH_RABBITMQ_URL`. This module runs in the environment of a contestant, so it may import only
the standard library.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from benchmarks.rivals import workloads
from benchmarks.rivals.workloads import Value

BATCH = 1000
BATCH_OF_PAYLOADS = 100  # 10 MB
CALLERS = 100


class Producer(Protocol):
    """Sends tasks and waits for results, in coroutines."""

    async def send(self, workload: str, value: Value) -> Any:
        """Store one task; return the argument for `result`."""

    async def send_many(self, workload: str, values: list[Value]) -> None:
        """Store a batch. Raises `NotImplementedError` if the library has no call for that."""

    async def result(self, sent: Any) -> Any:
        """Wait for the return value of the task."""


class PlainProducer(Protocol):
    """Sends tasks and waits for results, in plain functions."""

    def send(self, workload: str, value: Value) -> Any:
        """Store one task; return the argument for `result`."""

    def result(self, sent: Any) -> Any:
        """Wait for the return value of the task."""


Connect = Callable[[], AbstractAsyncContextManager[Producer]]
Answer = dict[str, Any]


def redis_url() -> str:
    return os.environ["BENCH_REDIS_URL"]


def postgres_url() -> str:
    return os.environ["BENCH_POSTGRES_URL"]


def rabbitmq_url() -> str:
    return os.environ["BENCH_RABBITMQ_URL"]


def workload_of_worker() -> str:
    """Return the workload of this worker process, for settings that depend on it."""
    return os.environ.get("BENCH_WORKLOAD", "noop")


def become(command: str, *words: str) -> NoReturn:
    """Replace this process by a program of its virtual environment."""
    program = str(Path(sys.executable).parent / command)
    os.execv(program, [program, *words])


def main(
    connect: Connect,
    worker: Callable[[], None],
    *,
    prepare: Callable[[], None] = lambda: None,
    loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
    abrupt: bool = False,
) -> None:
    """Run the commands for a library with coroutines; with `abrupt` a sender closes nothing."""

    def answer(options: argparse.Namespace) -> Answer:
        async def work() -> Answer:
            async with connect() as producer:
                await producer.send("noop", 0)  # opens connections
                answer = await _ask(producer, options)
                if abrupt:
                    print(json.dumps(answer), flush=True)
                    os._exit(0)
                return answer

        with asyncio.Runner(loop_factory=loop) as runner:
            return runner.run(work())

    _serve(answer, worker, prepare)


def plain_main(
    producer: PlainProducer,
    worker: Callable[[], None],
    *,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Run the commands for a library without coroutines."""

    def answer(options: argparse.Namespace) -> Answer:
        producer.send("noop", 0)  # opens connections
        return _ask_plain(producer, options)

    _serve(answer, worker, prepare)


def _serve(
    answer: Callable[[argparse.Namespace], Answer],
    worker: Callable[[], None],
    prepare: Callable[[], None],
) -> None:
    options = _parse()
    match options.action:
        case "prepare":
            prepare()
        case "worker":
            os.environ["BENCH_WORKLOAD"] = options.workload
            worker()
        case _:
            print(json.dumps(answer(options)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("prepare")
    for name in ("fill", "worker"):
        actions.add_parser(name).add_argument("workload", choices=workloads.NAMES)
    actions.add_parser("enqueue").add_argument("callers", type=int)
    for name in ("bulk", "roundtrip"):
        actions.add_parser(name)
    for name in ("fill", "enqueue", "bulk", "roundtrip"):
        actions.choices[name].add_argument("count", type=int)
    return parser.parse_args()


# --- coroutines ---


async def _ask(producer: Producer, options: argparse.Namespace) -> Answer:
    match options.action:
        case "fill":
            return await _fill(producer, options.workload, options.count - 1)
        case "enqueue":
            return await _enqueue(producer, "noop", options.callers, options.count)
        case "bulk":
            return await _bulk(producer, "noop", options.count)
        case "roundtrip":
            return await _roundtrip(producer, options.count)
    raise ValueError(options.action)


async def _fill(producer: Producer, workload: str, count: int) -> Answer:
    done = await _bulk(producer, workload, count)
    if "unsupported" in done:
        done = await _enqueue(producer, workload, CALLERS, count)
    return done


async def _bulk(producer: Producer, workload: str, count: int) -> Answer:
    size = BATCH_OF_PAYLOADS if workload == "payload" else BATCH
    started = time.perf_counter()
    try:
        for first in range(0, count, size):
            numbers = range(first, min(first + size, count))
            await producer.send_many(workload, [workloads.value(workload, n) for n in numbers])
    except NotImplementedError:
        return {"unsupported": True}
    return {"seconds": time.perf_counter() - started}


async def _enqueue(producer: Producer, workload: str, callers: int, count: int) -> Answer:
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await producer.send(workload, workloads.value(workload, number))

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return {"seconds": time.perf_counter() - started}


async def _roundtrip(producer: Producer, count: int) -> Answer:
    taken = []
    for number in range(count):
        started = time.perf_counter()
        result = await producer.result(await producer.send("noop", number))
        taken.append((time.perf_counter() - started) * 1000)
        _compare(result, number)
    return {"milliseconds": taken}


# --- plain functions ---


def _ask_plain(producer: PlainProducer, options: argparse.Namespace) -> Answer:
    match options.action:
        case "fill":
            return _enqueue_plain(producer, options.workload, 1, options.count - 1)
        case "enqueue":
            return _enqueue_plain(producer, "noop", options.callers, options.count)
        case "bulk":
            return {"unsupported": True}
        case "roundtrip":
            return _roundtrip_plain(producer, options.count)
    raise ValueError(options.action)


def _enqueue_plain(producer: PlainProducer, workload: str, callers: int, count: int) -> Answer:
    numbers = iter(range(count))

    def caller() -> None:
        for number in numbers:
            producer.send(workload, workloads.value(workload, number))

    with ThreadPoolExecutor(callers) as pool:
        started = time.perf_counter()
        for future in [pool.submit(caller) for _ in range(callers)]:
            future.result()
        return {"seconds": time.perf_counter() - started}


def _roundtrip_plain(producer: PlainProducer, count: int) -> Answer:
    taken = []
    for number in range(count):
        started = time.perf_counter()
        result = producer.result(producer.send("noop", number))
        taken.append((time.perf_counter() - started) * 1000)
        _compare(result, number)
    return {"milliseconds": taken}


def _compare(result: object, number: int) -> None:
    if result != number:
        raise ValueError(f"the result of {number} came back as {result!r}")
