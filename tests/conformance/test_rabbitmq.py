from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from aiotaskq.contract.broker import Consumer
from aiotaskq.contract.records import Depth
from aiotaskq.drivers.rabbitmq import RabbitBackend, RabbitBroker
from aiotaskq.drivers.rabbitmq.consumer import RabbitConsumer
from aiotaskq.testing import BrokerConformance, ResultConformance, check_broker
from tests.faults.scene import scaled
from tests.servers import RabbitServer, free_port

_numbers = itertools.count()
_LINGERING = 30.0  # seconds within which the server notices the end of a connection
_QUEUES = "[binary_to_list(element(4, amqqueue:get_name(Q))) || Q <- rabbit_amqqueue:list()]"
_CONNECTIONS = "length(rabbit_networking:connections())"


class RabbitHarness:
    can_cut = True
    can_stall = False

    def __init__(self, server: RabbitServer, door: Door | None) -> None:
        self._server = server
        self._door = door
        self._url = server.url() if door is None else door.url(server)
        self._prefix = f"t{next(_numbers)}"
        self._brokers: list[RabbitBroker] = []
        self._backends: list[RabbitBackend] = []
        self._control: RabbitBroker | None = None

    async def broker(self) -> RabbitBroker:
        broker = RabbitBroker(self._url, prefix=self._prefix)
        self._brokers.append(broker)
        await broker.open()
        return broker

    async def backend(self) -> RabbitBackend:
        backend = RabbitBackend(self._url, prefix=self._prefix)
        self._backends.append(backend)
        await backend.open()
        return backend

    async def pass_time(self, seconds: float) -> None:
        await asyncio.sleep(seconds + 0.05)

    async def now(self) -> float:
        return time.time()

    async def cut(self) -> None:
        assert self._door is not None
        await self._door.shut()

    async def mend(self) -> None:
        assert self._door is not None
        await self._door.open()

    async def stall(self, seconds: float) -> None:
        raise NotImplementedError

    async def leaks(self) -> list[str]:
        """Return messages, queues of closed consumers and clients, and stray connections.

        Queues of tasks and of delays and the two streams stay: their number does not grow.
        """
        if self._control is None:
            self._control = await self.broker()
        until = time.monotonic() + _LINGERING
        while (found := await self._left()) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        return found

    async def _left(self) -> list[str]:
        assert self._control is not None
        left = [f"{queue}: {depth}" for queue, depth in (await self._control.depth()).items()]
        passing = tuple(f"{self._prefix}.{kind}." for kind in ("consumer", "lock", "reply"))
        names = await asyncio.to_thread(self._server.evaluate, _QUEUES)
        left += [name for name in json.loads(names) if name.startswith(passing)]
        connections = int(await asyncio.to_thread(self._server.evaluate, _CONNECTIONS))
        ours = len(self._brokers) + len(self._backends)
        if connections > ours:
            left.append(f"{connections} connections of {ours} clients")
        return left

    async def kill(self, *consumers: Consumer) -> int:
        """Drop connections, and wait until the server has requeued the messages that they held."""
        living = [one for one in consumers if isinstance(one, RabbitConsumer) and one.lives]
        # Idle consumers first: they would get the messages of the others.
        return sum([await self._kill(one) for one in sorted(living, key=_held)])

    async def _kill(self, consumer: RabbitConsumer) -> int:
        held = _held(consumer)
        if self._control is None:
            self._control = await self.broker()
        control = self._control
        before = _there(await control.depth())
        await consumer.abort()
        while _there(await control.depth()) < before:
            await asyncio.sleep(0.001)
        while consumer.id in {one.id for one in await control.consumers()}:
            await asyncio.sleep(0.001)
        return held

    async def close(self) -> None:
        for broker in self._brokers:
            await broker.close()
        for backend in self._backends:
            await backend.close()
        if self._door is not None:
            await self._door.shut()


class Door:
    """A proxy that can be closed: restarting the server would take seconds."""

    def __init__(self, server: RabbitServer) -> None:
        self._server = server
        self._port = free_port()
        self._listening: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self, server: RabbitServer) -> str:
        return server.url().replace(f":{server.port}/", f":{self._port}/")

    async def open(self) -> None:
        self._listening = await asyncio.start_server(self._serve, self._server.host, self._port)

    async def shut(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        there, back = await asyncio.open_connection(self._server.host, self._server.port)
        self._writers |= {writer, back}
        await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))
        self._writers -= {writer, back}


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


def _held(consumer: RabbitConsumer) -> int:
    return sum(consumer.holds.values())


def _there(depths: Mapping[str, Depth]) -> int:
    return sum(one.ready + one.held for one in depths.values())


@pytest.fixture
async def harness(
    rabbit_server: RabbitServer, request: pytest.FixtureRequest
) -> AsyncIterator[RabbitHarness]:
    rabbit_server.start()
    door = None
    if "cuttable" in request.fixturenames:
        door = Door(rabbit_server)
        await door.open()
    harness = RabbitHarness(rabbit_server, door)
    yield harness
    await harness.close()


class TestRabbitBroker(BrokerConformance):
    lease: ClassVar[float] = 5.0
    delay: ClassVar[float] = 1.0
    impossible: ClassVar[Sequence[Mapping[str, Any]]] = (
        {"queue": "é" * 45},
        {"queue": "q" * 255},
        {"id": "i" * 1001},
    )

    @pytest.fixture(autouse=True)
    async def long_enough(self, request: pytest.FixtureRequest, harness: RabbitHarness) -> None:
        """Choose a delay that a busy machine does not outlast: a consumer opens within half."""
        if "self.delay" in inspect.getsource(request.function):
            broker = await harness.broker()
            began = time.monotonic()
            consumer = broker.consumer(["q"], name="pace", lease=self.lease)
            await consumer.open()
            await consumer.close()
            type(self).delay = max(1.0, 10 * (time.monotonic() - began))


class TestRabbitBackend(ResultConformance):
    """Within one process. Sending outcomes to others is covered by the tests of the driver."""

    ttl: ClassVar[float] = 0.5


@pytest.mark.timeout(3600)  # histories are long, and the machine may be busy
def test_random_histories_agree_with_the_model(rabbit_server: RabbitServer) -> None:
    rabbit_server.start()
    check_broker(
        lambda: RabbitHarness(rabbit_server, None), examples=scaled(3, 60), steps=30, shrink=False
    )
