from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from aiotaskq.drivers.postgres import PostgresBackend
from aiotaskq.testing.results import ResultConformance
from tests.servers import PostgresServer


class PostgresHarness:
    can_cut = True

    def __init__(self, server: PostgresServer, url: str) -> None:
        self._server = server
        self._url = url
        self._made: list[PostgresBackend] = []
        self._shift = 0.0

    async def backend(self) -> PostgresBackend:
        backend = PostgresBackend(self._url)
        backend._time_shift = self._shift
        self._made.append(backend)
        await backend.open()
        return backend

    async def pass_time(self, seconds: float) -> None:
        self._shift += seconds
        for backend in self._made:
            backend._time_shift = self._shift

    async def cut(self) -> None:
        await asyncio.to_thread(self._server.stop)

    async def mend(self) -> None:
        await asyncio.to_thread(self._server.start)

    async def close(self) -> None:
        for backend in self._made:
            await backend.close()


class TestPostgresBackend(ResultConformance):
    @pytest.fixture
    async def harness(
        self, postgres_server: PostgresServer, postgres_url: str
    ) -> AsyncIterator[PostgresHarness]:
        harness = PostgresHarness(postgres_server, postgres_url)
        yield harness
        await harness.close()
