"""The Redis driver."""

from __future__ import annotations

from aiotaskq.drivers.redis.broker import RedisBroker
from aiotaskq.drivers.redis.results import RedisBackend

__all__ = ["RedisBackend", "RedisBroker"]
