"""Which shard is for what.

There is a fixed number of shards, spread evenly over the slots and so over the nodes. That a queue
has another number of them changes where its messages go, and not what any key is called.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Mapping

SHARDS = 12
"""How many there are: as many as a queue may have, and divisible by most numbers of nodes."""

_SLOTS = 16384


def slot_of(tag: str) -> int:
    """Return the slot of a key with this tag in braces."""
    return crc_hqx(tag.encode(), 0) % _SLOTS


def _tags() -> tuple[str, ...]:
    """Return a tag for each shard, whose slot is about in the middle of its share of them."""
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


def number_of(name: str) -> int:
    """Return a number that every process finds for a name."""
    return crc_hqx(name.encode(errors="surrogatepass"), 0)


class Placement:
    """Where the messages of each queue go.

    Args:
        spread: How many shards a queue has; ``""`` for those that are not named.
    """

    def __init__(self, spread: Mapping[str, int]) -> None:
        self._spread = spread
        self._shards: dict[str, tuple[int, ...]] = {}

    def of(self, queue: str) -> tuple[int, ...]:
        """Return the shards of a queue, as far from one another as can be."""
        shards = self._shards.get(queue)
        if shards is None:
            first, count = number_of(queue), self._spread.get(queue, self._spread[""])
            shards = tuple((first + SHARDS * n // count) % SHARDS for n in range(count))
            if len(self._shards) < 10_000:
                self._shards[queue] = shards
        return shards

    def home(self, name: str) -> int:
        """Return the shard that knows an id, or a name."""
        return number_of(name) % SHARDS
