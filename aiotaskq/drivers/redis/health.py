"""What a server is told to be like where messages wait, and a word to people where it is not."""

from __future__ import annotations

import logging
from contextlib import suppress

from aiotaskq.drivers.redis.link import Link, read_info
from aiotaskq.errors import Unavailable

logger = logging.getLogger("aiotaskq.redis")


async def warn(link: Link, url: str) -> None:
    """Log a line for each way in which the server may lose what it has acknowledged.

    Never raises; says nothing of what the user may not ask the server.
    """
    with suppress(Unavailable):
        facts = read_info((await link.command("INFO")).decode())
        policy = facts.get("maxmemory_policy", "noeviction")
        if facts.get("maxmemory", "0") != "0" and policy != "noeviction":
            logger.warning(
                "Redis may evict what is queued: its maxmemory-policy is %s; set it to noeviction",
                policy,
                extra={"event": "redis_evicts", "url": url, "policy": policy},
            )
        if facts.get("aof_enabled") == "0" and not await _snapshots(link):
            logger.warning(
                "Redis loses what is queued when it is restarted: set appendonly to yes",
                extra={"event": "redis_not_persistent", "url": url},
            )


async def _snapshots(link: Link) -> bool:
    """Tell whether the server saves snapshots now and then."""
    reply = await link.command("CONFIG", "GET", "save")
    return len(reply) < 2 or bool(reply[1])
