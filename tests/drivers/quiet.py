"""A proxy whose connections go silent one by one, as those that a firewall has dropped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class QuietProxy:
    """Passes bytes between clients and a server; `swallow` silences the present connections.

    Attributes:
        port: The port on which it listens.
        connections: The number of accepted connections.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._generation = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        self.connections = 0

    def swallow(self) -> None:
        """Swallow all bytes of the present connections, without closing them."""
        self._generation += 1

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def end(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        there, back = await asyncio.open_connection(*self._target)
        generation = self._generation
        try:
            await asyncio.gather(
                self._pass(reader, back, generation), self._pass(there, writer, generation)
            )
        finally:
            back.close()
            writer.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if generation == self._generation:
                    writer.write(data)
            writer.close()


@contextlib.asynccontextmanager
async def quiet_proxy(host: str, port: int) -> AsyncIterator[QuietProxy]:
    """Run a proxy in front of a server."""
    proxy = QuietProxy(host, port)
    server = await proxy.start()
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()
