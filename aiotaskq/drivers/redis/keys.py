"""Redis keys: their names, types and contents.

This module is the only description of the layout: scripts, comments and documents refer to it. A
test compares it with the scripts and with a server in use. `items.py` describes items.

All keys begin with the prefix of the application. Those of one queue begin with its base,
``<prefix>:{<queue>}:``. The braces put all of them into one slot of a cluster. In a cluster the
prefix itself has a tag in braces, that of the shard: ``<prefix>:{<tag>}:{<queue>}:ready``. Redis
computes the slot from the first braces, so a shard is a complete store within one slot.
"""

from __future__ import annotations

from typing import Final

import msgspec


class RedisKey(msgspec.Struct, frozen=True):
    """One kind of key.

    Attributes:
        name: The rest of its name, after the base of a queue, or the prefix and a colon.
            ``<...>`` varies.
        type: Its type in Redis.
        holds: Its contents.
    """

    name: str
    type: str
    holds: str


QUEUE_KEYS: Final = (
    RedisKey("ready", "list", "items of priority 0 that may be handed out, oldest first"),
    RedisKey("ready:<1..9>", "list", "the same for each higher priority"),
    RedisKey(
        "ready:suspects", "list", "items that crashed SUSPECT times or more, handed out alone"
    ),
    RedisKey("levels", "set", "the priorities above 0 that may have items, and `suspects`"),
    RedisKey(
        "delayed", "sorted set", "`<serial> <item>` by the Unix time at which the item is due"
    ),
    RedisKey("held:<consumer>", "hash", "receipt number → item"),
    RedisKey("consumers", "sorted set", "consumers by the Unix time at which their lease ends"),
    RedisKey(
        "fenced",
        "sorted set",
        "consumers that were given up, until their items are taken back, by the time of that",
    ),
    RedisKey("floor:<consumer>", "string", "fetches with lower receipt numbers come too late"),
    RedisKey("dead", "sorted set", "keys of dead letters by the Unix time of their death"),
    RedisKey("letters", "hash", "key of a dead letter → `<JSON head>\\n<details><item>`"),
    RedisKey("wake", "list", "at most one token, which wakes one idle consumer"),
    RedisKey(
        "nudge:<consumer>",
        "list",
        "a token by which a consumer ends its own wait when an item falls due; for a minute",
    ),
    RedisKey(
        "meta",
        "hash",
        "`beat`: when a lease was last renewed, by the server's clock · "
        "`granted`: the beat after which all leases began anew · "
        "`seen`: when the server last worked since then, while nobody has renewed · "
        "`lease:<consumer>`: its length in seconds · "
        "`about:<consumer>`: `<JSON list of its queues>\\n<its own description>`, in its first "
        "queue · "
        "`note:<consumer>`: how a consumer in `fenced` died, where that is known",
    ),
    RedisKey("call:<call id>", "string", "the reply to that call of publish; for two minutes"),
    RedisKey(
        "parcel",
        "hash",
        "items on their way to the shard where their queue belongs, in a cluster: "
        "`id`, `shard` and `items`",
    ),
    RedisKey("parcel:<parcel id>", "string", "that parcel has arrived; for a day"),
    RedisKey("none", "string", "never exists: scripts delete it, or write and delete it"),
)
"""Keys behind the base of a queue."""

PREFIX_KEYS: Final = (
    RedisKey("queues", "set", "every queue that was ever used"),
    RedisKey("cancelled", "sorted set", "cancelled ids by the Unix time of their cancelling"),
    RedisKey("ids:<id>", "string", "a unique envelope of this id was stored; for a day"),
    RedisKey("result:<id>", "string", "the final outcome of a task, as JSON"),
    RedisKey("state:<id>", "string", "an outcome that is not final, as JSON"),
    RedisKey(
        "results",
        "channel",
        "final outcomes as they are stored: a JSON list of ids, or of a few small outcomes; "
        "one channel for all shards of a cluster",
    ),
    RedisKey("schedules", "hash", "id of a schedule → `<revision>\\n<body>`"),
    RedisKey("schedules:due", "sorted set", "ids of schedules by the Unix time of their next run"),
    RedisKey("none", "string", "never exists: see above"),
)
"""Keys behind the prefix and a colon."""

_QUOTED = str.maketrans({"%": "%25", "{": "%7B", "}": "%7D"})


class RedisKeys:
    """Names of the keys of one prefix.

    Args:
        given: The beginning of all keys.
        tag: The tag of a shard, so that all keys lie in one slot of a cluster.
    """

    def __init__(self, given: str, tag: str | None = None) -> None:
        self.given: Final = given
        prefix = given if tag is None else f"{given}:{{{tag}}}"
        self.prefix: Final = prefix
        self.queues: Final = f"{prefix}:queues"
        self.cancelled: Final = f"{prefix}:cancelled"
        self.results: Final = f"{given}:results"  # without the tag: a channel has no slot
        self.none: Final = f"{prefix}:none"
        self.schedules: Final = f"{prefix}:schedules"
        self.schedules_due: Final = f"{prefix}:schedules:due"
        self.ids: Final = f"{prefix}:ids:"  # an id follows
        self._bases: dict[str, str] = {}

    def base(self, queue: str) -> str:
        """Return the common beginning of all keys of a queue."""
        base = self._bases.get(queue)
        if base is None:
            # A brace in the name would end, or begin, the part that the slot is computed from.
            base = f"{self.prefix}:{{{queue.translate(_QUOTED)}}}:"
            if len(self._bases) < 10_000:
                self._bases[queue] = base
        return base

    def result(self, task_id: str) -> str:
        """Return the key of a final outcome."""
        return f"{self.prefix}:result:{task_id}"

    def outcome(self, task_id: str) -> tuple[str, str]:
        """Return the keys of a final outcome and of one that is not final."""
        return f"{self.prefix}:result:{task_id}", f"{self.prefix}:state:{task_id}"
