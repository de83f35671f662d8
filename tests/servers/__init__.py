"""Servers of the tests: installed binaries on free ports, with temporary folders.

They can be killed and started again on the same port with the same data. Only processes that were
started here are ever stopped, by pid. If the test run itself is killed, a watchdog stops them.
"""

from __future__ import annotations

from tests.servers.base import Server, ServerFailed, ServerMissing, Watchdog, free_port
from tests.servers.certificates import Certificates
from tests.servers.cluster import RedisCluster
from tests.servers.pgbouncer import PgBouncer
from tests.servers.postgres import PostgresServer
from tests.servers.rabbitmq import RabbitServer
from tests.servers.redis import RedisServer
from tests.servers.sentinel import SentinelSet

__all__ = [
    "Certificates",
    "PgBouncer",
    "PostgresServer",
    "RabbitServer",
    "RedisCluster",
    "RedisServer",
    "SentinelSet",
    "Server",
    "ServerFailed",
    "ServerMissing",
    "Watchdog",
    "free_port",
]
