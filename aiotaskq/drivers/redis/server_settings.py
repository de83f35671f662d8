"""Check of the server's settings: warnings where it may lose acknowledged data."""

from __future__ import annotations

from contextlib import suppress

from aiotaskq.drivers.redis.connection import RedisConnection, read_info
from aiotaskq.errors import Unavailable
from aiotaskq.readable import get_logger

logger = get_logger("aiotaskq.redis")


async def warn_of_data_loss(connection: RedisConnection, url: str) -> None:
    """Log a warning for each setting by which the server may lose queued messages.

    Never raises. Skips settings that the user has no permission to read.
    """
    with suppress(Unavailable):
        facts = read_info((await connection.command("INFO")).decode())
        policy = facts.get("maxmemory_policy", "noeviction")
        if facts.get("maxmemory", "0") != "0" and policy != "noeviction":
            logger.warning(
                "Redis may evict queued tasks: its maxmemory-policy is %s; set it to noeviction",
                policy,
                extra={"event": "redis_evicts", "url": url, "policy": policy},
            )
        if facts.get("aof_enabled") == "0" and not await _saves_snapshots(connection):
            logger.warning(
                "Redis loses queued tasks when it is restarted: set appendonly to yes",
                extra={"event": "redis_not_persistent", "url": url},
            )


async def _saves_snapshots(connection: RedisConnection) -> bool:
    reply = await connection.command("CONFIG", "GET", "save")
    return len(reply) < 2 or bool(reply[1])
