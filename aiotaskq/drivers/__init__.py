"""Drivers by URL. Each is imported only when a URL asks for it."""

from __future__ import annotations

import os
import threading
from importlib import import_module
from typing import Any, cast

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.results import ResultBackend
from aiotaskq.errors import ConfigError

EMBEDDED = "sqlite:///aiotaskq.db"
"""The default: a file in the working folder, durable, shared by the processes of a machine."""

_BROKERS = {
    "memory": "memory:MemoryBroker",
    "sqlite": "sqlite:SQLiteBroker",
    "redis": "redis:RedisBroker",
    "rediss": "redis:RedisBroker",
    "unix": "redis:RedisBroker",
    "redis+sentinel": "redis:RedisBroker",
    "rediss+sentinel": "redis:RedisBroker",
    "redis+cluster": "redis.cluster:ClusterBroker",
    "rediss+cluster": "redis.cluster:ClusterBroker",
    "postgresql": "postgres:PostgresBroker",
    "postgres": "postgres:PostgresBroker",
    "amqp": "rabbitmq:RabbitBroker",
    "amqps": "rabbitmq:RabbitBroker",
}
_BACKENDS = {
    "memory": "memory:MemoryBackend",
    "sqlite": "sqlite:SQLiteBackend",
    "redis": "redis:RedisBackend",
    "rediss": "redis:RedisBackend",
    "unix": "redis:RedisBackend",
    "redis+sentinel": "redis:RedisBackend",
    "rediss+sentinel": "redis:RedisBackend",
    "redis+cluster": "redis.cluster:ClusterBackend",
    "rediss+cluster": "redis.cluster:ClusterBackend",
    "postgresql": "postgres:PostgresBackend",
    "postgres": "postgres:PostgresBackend",
    "db+postgresql": "postgres:PostgresBackend",
    "db+postgresql+asyncpg": "postgres:PostgresBackend",
    "db+postgresql+psycopg": "postgres:PostgresBackend",
    "db+postgresql+psycopg2": "postgres:PostgresBackend",
    "amqp": "rabbitmq:RabbitBackend",
    "amqps": "rabbitmq:RabbitBackend",
}

_EXTRAS = {"rabbitmq": "aiotaskq[rabbitmq]"}
"""What is to be installed for a driver, where that is more than the package alone."""


# A child that was forked in the middle of an import would wait for the end of it for ever.
_importing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_importing.acquire,
        after_in_parent=_importing.release,
        after_in_child=_importing.release,
    )


def create_broker(url: str, *, prefix: str) -> Broker:
    """Return the closed broker that a URL names.

    Raises:
        ConfigError: No driver serves the URL, or its client library is not installed.
    """
    return cast("Broker", _create(url, prefix, _BROKERS, "broker"))


def create_backend(url: str, *, prefix: str) -> ResultBackend:
    """Return the closed result backend that a URL names.

    Raises:
        ConfigError: No driver serves the URL, or its client library is not installed.
    """
    return cast("ResultBackend", _create(url, prefix, _BACKENDS, "result backend"))


def _create(url: str, prefix: str, known: dict[str, str], role: str) -> Any:
    scheme, separator, _ = url.partition("://")
    target = known.get(scheme.lower())
    if not separator or target is None:
        shown = f"{scheme}://" if separator else repr(url)
        raise ConfigError(
            f"no {role} for {shown}; there are {', '.join(f'{name}://' for name in known)}"
        )
    module, _, name = target.partition(":")
    try:
        with _importing:
            driver = getattr(import_module(f"{__name__}.{module}"), name)
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// needs the library {error.name!r}, which is not installed:"
            f" pip install '{_EXTRAS.get(module, 'aiotaskq')}'"
        ) from error
    return driver(url, prefix=prefix)
