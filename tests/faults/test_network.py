"""Faults of the network between programs and Redis."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from urllib.parse import urlsplit

import pytest
from msgspec import Raw

from aiotaskq import Call, TaskQueue
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.results import ResultBackend
from aiotaskq.drivers.postgres import PostgresBackend
from aiotaskq.drivers.redis import RedisBackend, scripts
from aiotaskq.errors import BrokerUnavailable
from tests.faults.checker import Allowed
from tests.faults.fleet import Program, pids_of
from tests.faults.ledger import Acknowledged, Attempted, Started
from tests.faults.producer import Some
from tests.faults.proxy import Proxy
from tests.faults.scene import LEASE, Scene, scaled
from tests.faults.servers import healthy, serves
from tests.servers import RedisServer

LOAD = scaled(250, 5000)  # tasks
RATE = scaled(100, 120)  # a second
STRICT = Allowed(duplicates=0)
QUICK = "tests.faults.application.quick"
PATIENCE = 120.0


@pytest.fixture
def broker(redis_url: str) -> str:
    """The broker of the scene; the observer is not behind the proxy."""
    TaskQueue(broker=redis_url).drivers()  # not in a test: importing a driver reads files
    return redis_url


@pytest.fixture
def proxy(redis_server: RedisServer, seed: int) -> Iterator[Proxy]:
    with Proxy((redis_server.host, redis_server.port), seed=seed) as proxy:
        yield proxy


@pytest.fixture
def behind(proxy: Proxy) -> str:
    """The same broker, through the proxy."""
    return f"redis://{proxy.host}:{proxy.port}/0"


@pytest.fixture
async def client(behind: str) -> AsyncIterator[TaskQueue]:
    """An application in this process, behind the proxy."""
    app = TaskQueue("client", broker=behind)
    yield app
    await app.close()


# --- T03 ----------------------------------------------------------------------------------------


async def test_t03_replies_to_fetches_are_lost(scene: Scene, proxy: Proxy, behind: str) -> None:
    scene.set(worker_lease=120)  # a message that a living worker lost would never come back
    await scene.fleet.worker("-c", "20", processes=2, AIOTASKQ_BROKER_URL=behind)
    scene.producer(*scene.mix(LOAD), rate=RATE)

    async def lose(chosen: random.Random) -> bool:
        before = proxy.broken
        with scene.nemesis.lasting("lose a fetch"):
            proxy.lose_reply(scripts.FETCH.digest)
            async with asyncio.timeout(PATIENCE):
                while proxy.broken == before:
                    await asyncio.sleep(0.01)
        return True

    await scene.nemesis.run([lose], times=scaled(8, 200), every=(0.1, 0.4))
    await scene.drain()
    await healthy(scene)
    await scene.check(STRICT)


async def test_t03_connections_break_at_any_byte(scene: Scene, proxy: Proxy, behind: str) -> None:
    scene.set(worker_lease=120, broker_url=behind)
    proxy.sometimes(up=0.01, down=0.01)
    scene.nemesis.strike("breaks", seconds=scaled(5, 60))
    await scene.fleet.worker("-c", "20", processes=2)
    for _ in range(2):
        scene.producer(*scene.mix(LOAD // 2), rate=RATE / 2)
    await scene.drain()
    while proxy.broken < 5:  # a busy machine sends more at once, over fewer bytes
        scene.producer(*scene.mix(LOAD // 2), rate=RATE)
        await scene.drain()
    await healthy(scene)
    proxy.heal()
    await scene.check(STRICT)


# --- T25 ----------------------------------------------------------------------------------------

HOLES: dict[str, Callable[[Proxy], None]] = {
    "black_hole": Proxy.black_hole,  # nothing arrives, either way
    "half_open": Proxy.half_open,  # bytes reach the server, and no worker
    "hold": Proxy.hold,  # all bytes arrive, after the tasks were given to others
    "refuse": Proxy.refuse,
}


async def test_t25_workers_are_cut_off_for_longer_than_their_leases(
    scene: Scene, redis_server: RedisServer
) -> None:
    with contextlib.ExitStack() as stack:
        cut_off: list[tuple[Program, Proxy]] = []
        for _ in HOLES:
            proxy = stack.enter_context(Proxy((redis_server.host, redis_server.port)))
            url = f"redis://{proxy.host}:{proxy.port}/0?socket_timeout=1"
            program = await scene.fleet.worker("-c", "20", AIOTASKQ_BROKER_URL=url)
            cut_off.append((program, proxy))
        scene.producer(Some("quick", 60, {"seconds": [0.0, 2 * LEASE]}), rate=1000)
        await scene.ledger.count(Started, 40, within=PATIENCE)
        await scene.fleet.worker("-c", "50")
        for _ in range(scaled(1, 10)):
            hit = [pid for program, _ in cut_off for pid in pids(program, scene)]
            with scene.nemesis.lasting("holes", hit):
                holes = scene.nemesis.random.sample(list(HOLES.values()), len(HOLES))
                for (_, proxy), hole in zip(cut_off, holes, strict=True):
                    hole(proxy)
                await asyncio.sleep(1.5 * LEASE)
                await serves(scene)  # one worker is still reachable
                for _, proxy in cut_off:
                    proxy.heal()
            for program, _ in cut_off:
                await goes_on(scene, program)
        await scene.drain()
        await healthy(scene)
        await scene.check()


def pids(program: Program, scene: Scene) -> list[int]:
    return [pid for worker in scene.fleet.workers(program) for pid in pids_of(worker)]


async def goes_on(scene: Scene, program: Program) -> None:
    """Send tasks until one of them runs in a given program."""
    before = len(scene.ledger.of(Started))
    while True:
        producer = scene.producer(Some("quick", 50, {"seconds": 0.1}), rate=1000)
        assert await producer.wait(PATIENCE) == 0
        ours = pids(program, scene)
        if any(line.pid in ours for line in scene.ledger.of(Started)[before:]):
            return


# --- T26 ----------------------------------------------------------------------------------------


class Canceller:
    """A client that sends and waits, and whose calls are cancelled at random points."""

    def __init__(self, scene: Scene, app: TaskQueue, chance: random.Random) -> None:
        self._scene = scene
        self._app = app
        self._chance = chance
        self.cancelled = 0

    async def run(self, number: int) -> None:
        key = f"c-{number}"
        task_id = key if self._chance.random() < 0.7 else ""
        self._write(Attempted(key=key, task="quick", task_id=task_id))
        send = self._sending(key, task_id)
        handle_id = await self._perhaps(send)
        if handle_id is None:
            if not task_id:
                return  # whether it was stored is not known
            handle_id = await self._sending(
                key, task_id
            )  # whether or not the first call was carried out
        self._write(Acknowledged(key=key, task_id=handle_id))
        handle = self._app.handle(handle_id)
        value = await self._perhaps(handle.result(PATIENCE))
        if value is None:
            value = await handle.result(PATIENCE)
        assert value == key

    def _write(self, line: Attempted | Acknowledged) -> None:
        self._scene.writer.write(line)

    async def _sending(self, key: str, task_id: str) -> str:
        if task_id:
            return (await self._app.send(QUICK, [key], task_id=task_id)).id
        return (await self._app.send(QUICK, [key])).id

    async def _perhaps(self, work: Awaitable[str]) -> str | None:
        """Run a coroutine to its end, or cancel it at a random point."""
        waiting = asyncio.ensure_future(work)
        if self._chance.random() < 0.6:
            if self._chance.random() < 0.5:
                await asyncio.sleep(self._chance.uniform(0.0, 0.25))
            else:
                for _ in range(self._chance.randrange(12)):
                    await asyncio.sleep(0)
            waiting.cancel()
        try:
            return await waiting
        except asyncio.CancelledError:
            self.cancelled += 1
            return None


async def test_t26_awaits_are_cancelled_at_random(
    scene: Scene, proxy: Proxy, client: TaskQueue, chance: random.Random
) -> None:
    await scene.fleet.worker("-c", "50")
    proxy.delay(up=0.05, down=0.05)
    count = scaled(1500, 10_000)
    canceller = Canceller(scene, client, chance)
    at_once = asyncio.Semaphore(300)

    async def one(number: int) -> None:
        async with at_once:
            await canceller.run(number)

    async with asyncio.timeout(10 * PATIENCE), asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
    assert canceller.cancelled > count / 4
    proxy.heal()
    await scene.drain()
    await healthy(scene)
    verdict = await scene.check(STRICT)
    assert verdict.counts["acknowledged"] > count / 2


@pytest.mark.parametrize("kind", ["redis", "postgres"])
async def test_t26_commands_of_drivers_are_cancelled_at_random(
    kind: str, request: pytest.FixtureRequest, chance: random.Random
) -> None:
    url = str(request.getfixturevalue(f"{kind}_url"))
    host, port = urlsplit(url).hostname, urlsplit(url).port
    assert host is not None
    assert port is not None
    direct, ids = BACKENDS[kind](url), [f"id-{number}" for number in range(100)]
    await direct.open()
    await direct.store([outcome(one) for one in ids], None)
    await direct.close()
    answered = 0
    with Proxy((host, port)) as proxy:
        backend = BACKENDS[kind](url.replace(f":{port}/", f":{proxy.port}/"))
        await backend.open()
        proxy.delay(up=0.01, down=0.01)

        async def load(some: list[str]) -> None:
            nonlocal answered
            found = await backend.load(some)
            assert {i: one.task_id for i, one in found.items()} == {i: i for i in some}
            answered += 1

        async with asyncio.timeout(10 * PATIENCE):
            for _ in range(scaled(25, 400)):
                tasks = [asyncio.create_task(load(chance.sample(ids, 3))) for _ in range(25)]
                await asyncio.sleep(chance.uniform(0.0, 0.04))
                for task in chance.sample(tasks, 12):
                    task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert result is None or isinstance(result, asyncio.CancelledError), result
        proxy.heal()
        assert len(await backend.load(ids)) == len(ids)
        await backend.close()
    assert answered >= scaled(25, 400) * 13


BACKENDS: dict[str, Callable[[str], ResultBackend]] = {
    "redis": RedisBackend,
    "postgres": PostgresBackend,
}


def outcome(task_id: str) -> Outcome:
    return Outcome(task_id=task_id, status=TaskStatus.SUCCESS, result=Raw(b"1"))


# --- T37 ----------------------------------------------------------------------------------------


async def test_t37_senders_repeat_what_they_do_not_know_to_be_stored(
    scene: Scene, proxy: Proxy, behind: str, chance: random.Random
) -> None:
    await scene.fleet.worker("-c", "50")
    proxy.sometimes(up=0.1, down=0.2)
    count = scaled(1000, 10_000)
    keys = [f"r-{number}" for number in range(count)]
    scene.writer.write(*(Attempted(key=key, task="quick", task_id=key) for key in keys))
    scene.nemesis.strike("breaks")
    async with asyncio.TaskGroup() as group:
        for _ in range(2):  # both send all of them
            mixed = chance.sample(keys, count)
            group.create_task(repeat(scene, behind, mixed, random.Random(chance.random())))
    assert proxy.broken > 20
    proxy.heal()
    await scene.drain()
    await healthy(scene)
    verdict = await scene.check(STRICT)
    assert verdict.counts["ok"] == count


async def repeat(scene: Scene, url: str, keys: list[str], chance: random.Random) -> None:
    """Send tasks with chosen ids until each is acknowledged, and some once more."""
    app = TaskQueue("sender", broker=url, broker_publish_timeout=0.01)
    while keys:
        batch = keys[: chance.randint(1, 20)]
        with contextlib.suppress(BrokerUnavailable):
            await app.kiq_many([Call(QUICK, (key,), {}, {"task_id": key}) for key in batch])
            scene.writer.write(*(Acknowledged(key=key, task_id=key) for key in batch))
            if chance.random() < 0.8:
                keys = keys[len(batch) :]
    await app.close()
