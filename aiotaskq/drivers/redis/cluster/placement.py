"""Placement of queues, ids and names on the shards of a cluster.

There is a fixed number of shards, spread evenly over the slots and so over the nodes. A change in
the number of shards of a queue changes where its messages go, and the name of no key.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Mapping

from aiotaskq.drivers.redis.url import MAX_SHARDS

SHARDS = MAX_SHARDS
"""The number of shards: as many as a queue may have, and a multiple of many numbers of nodes."""

_SLOTS = 16384


def slot_of(tag: str) -> int:
    """Return the slot of a key with this tag in braces."""
    return crc_hqx(tag.encode(), 0) % _SLOTS


def _tags() -> tuple[str, ...]:
    """Return a tag for each shard, whose slot is near the middle of the shard's share of slots."""
    tags: list[str] = []
    share = _SLOTS // SHARDS
    for shard in range(SHARDS):
        middle = shard * share + share // 2
        number = 0
        while abs(slot_of(f"{shard}.{number}") - middle) > share // 8:
            number += 1
        tags.append(f"{shard}.{number}")
    return tuple(tags)


TAGS = _tags()


def hash_of(name: str) -> int:
    """Return a number that every process computes for a name."""
    return crc_hqx(name.encode(errors="surrogatepass"), 0)


class ShardPlacement:
    """The shards of each queue.

    Args:
        spread: The number of shards of a queue, by queue; ``""`` stands for all others.
    """

    def __init__(self, spread: Mapping[str, int]) -> None:
        self._spread = spread
        self._shards: dict[str, tuple[int, ...]] = {}

    def shards_of(self, queue: str) -> tuple[int, ...]:
        """Return the shards of a queue, as far from one another as can be."""
        shards = self._shards.get(queue)
        if shards is None:
            first, count = hash_of(queue), self._spread.get(queue, self._spread[""])
            shards = tuple((first + SHARDS * n // count) % SHARDS for n in range(count))
            if len(self._shards) < 10_000:
                self._shards[queue] = shards
        return shards

    def home_of(self, name: str) -> int:
        """Return the shard of an id or of another name."""
        return hash_of(name) % SHARDS
