"""The servers that contestants work on, looked at from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import psutil
import redis

from benchmarks.rivals.contestants import Contestant
from tests.servers import PostgresServer, RedisServer, Watchdog


class Store(ABC):
    """A server with room for one contestant at a time."""

    @abstractmethod
    def empty(self) -> None:
        """Make room for the next one."""

    @abstractmethod
    def count(self, query: str) -> int:
        """Return what a query of a `rival.toml` counts."""

    @abstractmethod
    def variables(self) -> dict[str, str]:
        """Tell a `bench` where it is."""

    @abstractmethod
    def processes(self) -> list[psutil.Process]:
        """Return the processes of the server."""

    @abstractmethod
    def close(self) -> None:
        """End the server."""

    def left(self, one: Contestant) -> int:
        """How many tasks of it are still to be done."""
        return sum(self.count(query) for query in one.left)


class RedisStore(Store):
    """Redis that keeps everything in memory."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.server = RedisServer(watchdog, durable=False)
        self.server.start()

    def empty(self) -> None:
        self.server.flush()

    def count(self, query: str) -> int:
        database, _, command = query.partition(": ")
        with redis.Redis.from_url(self.server.url(int(database))) as client:
            client.response_callbacks.clear()  # the answer as it came
            answer: Any = client.execute_command(*command.split(" "))
        if not isinstance(answer, list):
            return int(answer)
        return answer[0] if answer and isinstance(answer[0], int) else len(answer)

    def variables(self) -> dict[str, str]:
        return {"BENCH_REDIS_URL": self.server.url().removesuffix("/0")}

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(self.server.pid)]

    def close(self) -> None:
        self.server.close()


class PostgresStore(Store):
    """PostgreSQL without fsync; each contestant has a new database."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.server = PostgresServer(watchdog)
        self.server.start()
        self.database = self.server.create_database()

    def empty(self) -> None:
        self.server.drop_database(self.database)
        self.database = self.server.create_database()

    def count(self, query: str) -> int:
        return int(self.server.sql(query, database=self.database)[0])

    def variables(self) -> dict[str, str]:
        return {"BENCH_POSTGRES_URL": self.server.url(self.database)}

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.server.pid)
        return [parent, *parent.children()]

    def close(self) -> None:
        self.server.close()
