"""Cost of the single steps of a task: ``python -m benchmarks micro``.

Each figure is in microseconds per task. Steps of the core are plain calls in a loop. Steps of the
drivers are calls with batches of 1, 10, 100 and 1,000, one call after the other, on servers that
the benchmark starts. So a batch of 1 is the time of a round trip. The preparation of a step, such
as storing tasks before they are fetched, does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

import msgspec

from aiotaskq import TaskQueue
from aiotaskq.client.prepare import prepare, seal
from aiotaskq.contract.broker import Broker, Consumer
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.results import ResultBackend
from aiotaskq.contract.settlement import Done
from aiotaskq.ids import new_id
from aiotaskq.tasks.call import Call
from benchmarks.figures import Figure
from benchmarks.measures.bench import Bench, Store, run

SIZES = (1, 10, 100, 1000)
_LEASE = 600.0  # seconds; it is not renewed
_TTL = 3600.0
_QUEUE = "default"

Step: TypeAlias = tuple[str, Callable[[], object]]
"""The name of a step of the core, and a function that does it once."""

Steps: TypeAlias = dict[str, list[float]]
"""Seconds per task, by step, with a value for each run."""

app = TaskQueue("micro", broker="memory://")


@app.task
async def small(x: int) -> int:
    return x


@app.task
async def typed(name: str, when: datetime, amounts: dict[str, float], *, urgent: bool) -> str:
    return name


SMALL = small.s(1)
TYPED = typed.s("invoice", datetime(2026, 1, 1, tzinfo=UTC), {"net": 9.5, "tax": 1.8}, urgent=True)


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield microseconds per task, for the core and then for each driver."""
    runs = bench.runs(5)
    loops = bench.size(20_000, 200)
    for name, step in _core_steps():
        yield _figure(name, [_time(step, loops) for _ in range(runs)])
    for fresh in (_memory, bench.sqlite, bench.redis):
        for size in SIZES:
            store = fresh()
            steps = _broker_steps(store, size, _repeats(bench, size), runs)
            yield from _figures(store, size, steps)
    for fresh in (_memory, bench.sqlite, bench.redis, bench.mixed):
        for size in SIZES:
            store = fresh()
            steps = _backend_steps(store, size, _repeats(bench, size), runs)
            yield from _figures(store, size, steps)


def _memory() -> Store:
    return Store("memory", "memory://", "memory://")


def _repeats(bench: Bench, size: int) -> int:
    return bench.size(max(3, min(300, 20_000 // size)), 2)


def _figures(store: Store, size: int, work: Coroutine[None, None, Steps]) -> Iterator[Figure]:
    for name, taken in run(work).items():
        yield _figure(f"{store.name}: {name}, batch of {size:,}", taken)


def _figure(name: str, seconds: Sequence[float]) -> Figure:
    return Figure(name, "µs/task", [each * 1e6 for each in seconds])


# The core


def _core_steps() -> Iterator[Step]:
    yield from _message_steps(SMALL, "one int")
    yield from _message_steps(TYPED, "four typed arguments")
    codec, task_id = app.codec, new_id()
    outcome = _outcome(task_id)
    text = msgspec.json.encode(outcome)
    encoder, decoder = msgspec.json.Encoder(), msgspec.json.Decoder(Outcome)
    yield "encode a result, one int", lambda: codec.encode_result(1)
    yield "make an outcome", lambda: _outcome(task_id)
    yield "encode an outcome", lambda: encoder.encode(outcome)
    yield "decode an outcome", lambda: decoder.decode(text)


def _message_steps(call: Call[Any], what: str) -> Iterator[Step]:
    codec = app.codec
    task = app.tasks[call.name]
    outgoing = prepare(call, app)
    body = seal(outgoing, codec).body
    message = codec.decode_message(body)
    args, kwargs = task.arguments.load(message, body)
    yield f"check a call, {what}", lambda: task.arguments.check(args, kwargs)
    yield f"prepare a message, {what}", lambda: prepare(call, app)
    yield f"encode a message, {what}", lambda: seal(outgoing, codec)
    yield f"decode a message, {what}", lambda: codec.decode_message(body)
    yield f"read and convert arguments, {what}", lambda: task.arguments.load(message, body)


def _time(step: Callable[[], object], loops: int) -> float:
    started = time.perf_counter()
    for _ in range(loops):
        step()
    return (time.perf_counter() - started) / loops


# The drivers


async def _broker_steps(store: Store, size: int, repeats: int, runs: int) -> Steps:
    """Publish, fetch and settle batches."""
    async with store.app() as queue:
        broker = await queue.broker()
        consumer = broker.consumer([_QUEUE], name="micro", lease=_LEASE)
        await consumer.open()
        try:
            return _joined([await _pass(broker, consumer, size, repeats) for _ in range(runs)])
        finally:
            await consumer.close()


async def _pass(broker: Broker, consumer: Consumer, size: int, repeats: int) -> dict[str, float]:
    batches = [[_envelope() for _ in range(size)] for _ in range(repeats)]
    publishing = fetching = settling = 0.0
    for batch in batches:
        started = time.perf_counter()
        await broker.publish(batch)
        publishing += time.perf_counter() - started
    for _ in batches:
        started = time.perf_counter()
        deliveries = await consumer.fetch(size, 0)
        fetched = time.perf_counter()
        if len(deliveries) != size:
            raise RuntimeError(f"fetched {len(deliveries)} of {size}")
        done = [Done(delivery) for delivery in deliveries]
        fetching += fetched - started
        started = time.perf_counter()
        await consumer.settle(done)
        settling += time.perf_counter() - started
    count = size * repeats
    return {
        "publish": publishing / count,
        "fetch": fetching / count,
        "settle": settling / count,
        "fetch and settle": (fetching + settling) / count,
    }


async def _backend_steps(store: Store, size: int, repeats: int, runs: int) -> Steps:
    """Store batches of results."""
    async with store.app() as queue:
        backend = await queue.backend()
        assert backend is not None  # each of these stores keeps results
        return _joined([{"store": await _store(backend, size, repeats)} for _ in range(runs)])


async def _store(backend: ResultBackend, size: int, repeats: int) -> float:
    taken = 0.0
    for _ in range(repeats):
        batch = [_outcome(new_id()) for _ in range(size)]
        started = time.perf_counter()
        await backend.store(batch, _TTL)
        taken += time.perf_counter() - started
    return taken / (size * repeats)


def _joined(passes: Sequence[dict[str, float]]) -> Steps:
    return {name: [each[name] for each in passes] for name in passes[0]}


def _envelope() -> Envelope:
    return seal(prepare(SMALL, app), app.codec)


def _outcome(task_id: str) -> Outcome:
    return Outcome(
        task_id=task_id,
        status=TaskStatus.SUCCESS,
        result=msgspec.Raw(b"1"),
        date_done=datetime.now(UTC),
        name=small.name,
        worker="host:4711",
        queue=_QUEUE,
        execution_time=0.0001,
    )
