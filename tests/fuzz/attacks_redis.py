"""Attacks on a Redis store: keys of other types, hostile members, fields, scores and notices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeAlias

import redis

from aiotaskq.testing.fuzz import NOTICES, Attack, heads, texts
from aiotaskq.testing.fuzz.seeds import message

OF_QUEUE = (
    *("ready", "ready:7", "ready:suspects", "levels", "delayed", "consumers", "fenced", "dead"),
    *("letters", "wake", "meta"),
)
OF_PREFIX = ("queues", "cancelled", "schedules", "schedules:due")
SCORES = ("inf", "-inf", "1e300", "-1", "0", "9e15")


Client: TypeAlias = "redis.Redis | redis.RedisCluster"
Commands: TypeAlias = tuple[tuple[Any, ...], ...]


def attacks(client: Client, seed: int, prefix: str = "aiotaskq") -> list[Attack]:
    """Return the attacks on a store; in a cluster, the prefix has the tag of a shard."""
    base = f"{prefix}:{{default}}:"
    values: list[str | bytes] = [*texts(), b"\xff"]
    named = [
        *_types(prefix, base),
        *(pair for value in values for pair in _values(prefix, base, value)),
        *(pair for head in heads(random.Random(seed)) for pair in _heads(base, head)),
        *_notices(),
    ]
    return [Attack(name[:300], partial(_run, client, commands)) for name, commands in named]


def _types(prefix: str, base: str) -> Iterator[tuple[str, Commands]]:
    for key in [*(base + one for one in OF_QUEUE), *(f"{prefix}:{one}" for one in OF_PREFIX)]:
        for words in (
            ("SET", key, "x"),
            ("HSET", key, "a", "b"),
            ("RPUSH", key, "x"),
            ("SADD", key, "x"),
            ("ZADD", key, "1", "x"),
        ):
            yield f"{key} by {words[0]}", (("DEL", key), words)
        yield f"no {key}", (("DEL", key),)


def _values(prefix: str, base: str, value: str | bytes) -> Iterator[tuple[str, Commands]]:
    for field in ("beat", "granted", "seen", "lease:x", "about:x", "note:x"):
        yield f"meta {field}={value!r}", (("HSET", f"{base}meta", field, value),)
    yield f"queues has {value!r}", (("SADD", f"{prefix}:queues", value),)
    yield f"levels has {value!r}", (("SADD", f"{base}levels", value),)
    yield f"a letter {value!r}", (("HSET", f"{base}letters", value, value),)
    yield f"a schedule {value!r}", (("HSET", f"{prefix}:schedules", value, value),)
    yield f"a token {value!r}", (("RPUSH", f"{base}wake", value),)
    for score in SCORES:
        for name in ("delayed", "consumers", "fenced", "dead"):
            yield f"{name} has {value!r} at {score}", (("ZADD", base + name, score, value),)
        for name in ("cancelled", "schedules:due"):
            key = f"{prefix}:{name}"
            yield f"{name} has {value!r} at {score}", (("ZADD", key, score, value),)
    yield (
        f"a forged consumer {value!r}",
        (
            ("ZADD", f"{base}consumers", "9e15", value),
            ("HSET", f"{base}meta", b"about:" + _bytes(value), value),
        ),
    )
    yield (
        f"a fenced consumer that holds {value!r}",
        (
            ("ZADD", f"{base}fenced", "1", "forged"),
            ("HSET", f"{base}held:forged", value, value, "1", value),
        ),
    )


def _heads(base: str, head: bytes) -> Iterator[tuple[str, Commands]]:
    yield f"ready has {head[:50]!r}", (("RPUSH", f"{base}ready", head, head + message()),)
    yield (
        f"ready:7 has {head[:50]!r}",
        (("RPUSH", f"{base}ready:7", head + message()), ("SADD", f"{base}levels", "7")),
    )
    yield f"delayed has {head[:50]!r}", (("ZADD", f"{base}delayed", "1", head + message()),)
    yield (
        f"a suspect {head[:50]!r}",
        (("RPUSH", f"{base}ready:suspects", head), ("SADD", f"{base}levels", "suspects")),
    )


def _notices() -> Iterator[tuple[str, Commands]]:
    for notice in (*NOTICES, b"[" * 100_000 + b"]" * 100_000):
        yield f"the notice {notice[:50]!r}", (("PUBLISH", "aiotaskq:results", notice),)


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _run(client: Client, commands: Commands) -> None:
    for words in commands:
        try:
            client.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py's
        except redis.ResponseError as error:
            # What was there before is of another type: then that is the hostile entry.
            if "WRONGTYPE" not in str(error):
                raise
