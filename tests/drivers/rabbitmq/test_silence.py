"""Connections whose packets are dropped without a sign, and hosts that do not answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from aiotaskq import TaskQueue
from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.rabbitmq import RabbitBroker, transport
from tests.servers import RabbitServer, free_port

PATIENCE = 30.0


class Network:
    """A way to the server that can drop everything on the connections that it has."""

    def __init__(self, server: RabbitServer) -> None:
        self.port = free_port()
        self._server = server
        self._dropped = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def url(self) -> str:
        return self._server.url().replace(f":{self._server.port}/", f":{self.port}/")

    def drop(self) -> None:
        """Drop everything on the connections that there are now, in both directions."""
        self._dropped.set()
        self._dropped = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._server.host, self._server.port)
        dropped = self._dropped
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.create_task(_pass_on(source, target, dropped))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dropped: asyncio.Event
) -> None:
    try:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**16):
                if not dropped.is_set():
                    writer.write(data)
                    await writer.drain()
    finally:
        writer.transport.abort()


@pytest.fixture
async def network(rabbit_server: RabbitServer, url: str) -> AsyncIterator[Network]:
    network = Network(rabbit_server)
    listening = await asyncio.start_server(network.serve, "127.0.0.1", network.port)
    yield network
    listening.close()
    await network.end()


async def test_the_first_send_after_a_connection_was_dropped_without_a_sign_succeeds(
    network: Network, broker: RabbitBroker, prefix: str
) -> None:
    app = TaskQueue("t", broker=network.url(), prefix=prefix, backend="disabled://")

    @app.task(queue="q")
    async def noop() -> None: ...

    async with app:
        await noop.kiq()
        network.drop()
        await noop.kiq()  # within broker_publish_timeout, which is five seconds
        network.drop()
        await noop.with_options(countdown=0.001, queue="another").kiq()  # which has to be declared
    assert (await broker.depth())["q"].ready == 2


async def test_the_first_host_that_answers_is_used(
    network: Network, rabbit_server: RabbitServer, prefix: str
) -> None:
    place = f"{rabbit_server.host}:{rabbit_server.port}"
    several = rabbit_server.url().replace(place, f"127.0.0.1:{free_port()},{place}")
    broker = RabbitBroker(several, prefix=prefix)
    await broker.open()
    await broker.publish([Envelope(id="a", queue="q", body=b"x")])
    assert (await broker.depth())["q"].ready == 1
    await broker.close()


async def test_a_server_that_is_only_slow_is_waited_for(
    broker: RabbitBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_QUIET", 0.05)
    await broker.publish([Envelope(id="a", queue="q", body=b"x")])
    connection = await broker._connection.get().transport()
    with connection.expect_answer():
        async with asyncio.timeout(PATIENCE):
            while connection._checking is None:
                await asyncio.sleep(0.01)
            while connection._checking is not None:
                await asyncio.sleep(0.01)
    assert connection.error is None
