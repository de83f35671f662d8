"""Drivers by URL. Each is imported only when a URL asks for it.

A scheme that is not built in is looked for among the entry points of installed distributions: see
`aiotaskq.drivers.entry_points`.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, cast

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.results import ResultBackend
from aiotaskq.drivers.entry_points import (
    BACKEND,
    BROKER,
    BackendFactory,
    BrokerFactory,
    Driver,
    Role,
    claimed_schemes,
    find_driver,
)
from aiotaskq.errors import ConfigError
from aiotaskq.forks import importing

__all__ = [
    "EMBEDDED",
    "BackendFactory",
    "BrokerFactory",
    "Driver",
    "create_backend",
    "create_broker",
]

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

_BUILT_IN: dict[Role, dict[str, str]] = {BROKER: _BROKERS, BACKEND: _BACKENDS}
_OWN = {*_BROKERS, *_BACKENDS, "rpc", "disabled"}
"""The schemes that no distribution can claim; `TaskQueue` itself serves the last two."""

_EXTRAS = {"rabbitmq": "aiotaskq[rabbitmq]"}
"""The extras of drivers that need more than the package alone."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://", re.ASCII)


def create_broker(url: str, *, prefix: str) -> Broker:
    """Return the closed broker that a URL names.

    Raises:
        ConfigError: No driver serves the URL, or it cannot be loaded: its client library is not
            installed, or its distribution is broken.
    """
    return cast("Broker", _create(url, prefix, BROKER))


def create_backend(url: str, *, prefix: str) -> ResultBackend:
    """Return the closed result backend that a URL names.

    Raises:
        ConfigError: For the same reasons as in `create_broker`.
    """
    return cast("ResultBackend", _create(url, prefix, BACKEND))


def _create(url: str, prefix: str, role: Role) -> Any:
    found = _URL.match(url)
    if found is None:  # the URL is not shown: it may contain a password
        raise ConfigError(f"the URL of the {role.title} does not begin with a scheme and ://")
    scheme = found[1].lower()
    target = _BUILT_IN[role].get(scheme)
    if target is not None:
        return _built_in(scheme, target)(url, prefix=prefix)
    with importing:
        driver = None if scheme in _OWN else find_driver(scheme)
        if driver is None:
            raise _unknown(scheme, role)
    return driver.create(role, url, prefix)


def _built_in(scheme: str, target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        with importing:
            return getattr(import_module(f"{__name__}.{module}"), name)
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// needs the library {error.name!r}, which is not installed:"
            f" pip install '{_EXTRAS.get(module, 'aiotaskq')}'"
        ) from error


def _unknown(scheme: str, role: Role) -> ConfigError:
    """Return the error for a scheme without such a driver; it lists the schemes that have one."""
    why = ", which is for results only" if role is BROKER and scheme in _BACKENDS else ""
    known = [f"{name}://" for name in _BUILT_IN[role]]
    known += [
        f"{name}:// (from {' and '.join(distributions)})"
        for name, distributions in sorted(claimed_schemes().items())
        if name not in _OWN
    ]
    return ConfigError(f"no {role.title} for {scheme}://{why}; there are {', '.join(known)}")
