"""The servers of the contestants, and the figures that the benchmark reads from them."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import psutil
import redis

from benchmarks.rivals.contestants import Contestant
from tests.servers import Certificates, PostgresServer, RabbitServer, RedisServer, Watchdog


class Store(ABC):
    """A server for one contestant at a time."""

    @abstractmethod
    def empty(self) -> None:
        """Delete all data, for the next contestant."""

    @abstractmethod
    def count(self, query: str) -> int:
        """Return the result of a counting query in a `rival.toml`."""

    @abstractmethod
    def variables(self) -> dict[str, str]:
        """Return the environment variables with its URLs, for a `bench`."""

    @abstractmethod
    def processes(self) -> list[psutil.Process]:
        """Return the processes of the server."""

    def versions(self) -> dict[str, str]:
        """Return the version of the server by name, if `compare` cannot get it from a program."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """End the server."""

    def left(self, one: Contestant) -> int:
        """Return the number of unfinished tasks of a contestant."""
        return sum(self.count(query) for query in one.left)


class RedisStore(Store):
    """A Redis server that stores nothing on disk."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.server = RedisServer(watchdog, durable=False)
        self.server.start()

    def empty(self) -> None:
        self.server.flush()

    def count(self, query: str) -> int:
        database, _, command = query.partition(": ")
        with redis.Redis.from_url(self.server.url(int(database))) as client:
            client.response_callbacks.clear()  # the raw answer
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
    """A PostgreSQL server without fsync; each contestant has a new database."""

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

    def versions(self) -> dict[str, str]:
        return {"PostgreSQL": self.server.sql("SHOW server_version")[0]}

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.server.pid)
        return [parent, *parent.children()]

    def close(self) -> None:
        self.server.close()


# The queues themselves are asked: RabbitMQ's own count of a quorum queue is up to 5 seconds old.
_COUNT = """
lists:sum([
    case amqqueue:get_type(Q) of
        rabbit_quorum_queue ->
            {ok, {_, N}, _} = ra:leader_query(
                amqqueue:get_pid(Q), fun rabbit_fifo:query_messages_total/1),
            N;
        _ -> [{messages, N}] = rabbit_amqqueue:info(Q, [messages]), N
    end
    || Q <- rabbit_amqqueue:list(<<"%s">>),
       re:run(element(4, amqqueue:get_name(Q)), <<"^(%s)$">>) =/= nomatch
])
"""


class RabbitStore(Store):
    """A RabbitMQ server, and a Redis server for results; each contestant has a new virtual host."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.results = RedisStore(watchdog)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            self.server = RabbitServer(watchdog, Certificates(Path(folder)))
            self.server.start()
        self._made = 0
        self._make_host()

    def empty(self) -> None:
        self.results.empty()
        self.server.evaluate(f'rabbit_vhost:delete(<<"{self._host}">>, <<"bench">>)')
        self._make_host()

    def count(self, query: str) -> int:
        where, _, pattern = query.partition(": ")
        if where != "queue":
            return self.results.count(query)
        return int(self.server.evaluate(_COUNT % (self._host, pattern)))

    def variables(self) -> dict[str, str]:
        url = self.server.url(query=self._host)
        return {"BENCH_RABBITMQ_URL": url, **self.results.variables()}

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.server.pid)
        return [parent, *parent.children(recursive=True), *self.results.processes()]

    def versions(self) -> dict[str, str]:
        return {"RabbitMQ": self.server.evaluate("rabbit_misc:version()").strip('"')}

    def close(self) -> None:
        self.server.close()
        self.results.close()

    @property
    def _host(self) -> str:
        return f"bench{self._made}"

    def _make_host(self) -> None:
        self._made += 1
        host, every = f'<<"{self._host}">>', '<<".*">>'
        self.server.evaluate(
            f'rabbit_vhost:add({host}, <<"bench">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"guest">>, {host}, {every}, {every}, {every}, <<"bench">>)'
        )
