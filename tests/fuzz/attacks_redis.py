"""Attacks on a Redis store: keys of other types, hostile members, fields, scores and notices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeAlias

import redis

from aiotaskq.testing.fuzz import NOTICES, Attack, heads, texts
from aiotaskq.testing.fuzz.seeds import message

BASE = "aiotaskq:{default}:"
OF_QUEUE = (
    *("ready", "ready:7", "ready:suspects", "levels", "delayed", "consumers", "fenced", "dead"),
    *("letters", "wake", "meta"),
)
OF_PREFIX = ("queues", "cancelled", "schedules", "schedules:due")
KEYS = [*(BASE + one for one in OF_QUEUE), *(f"aiotaskq:{one}" for one in OF_PREFIX)]
SCORES = ("inf", "-inf", "1e300", "-1", "0", "9e15")


Commands: TypeAlias = tuple[tuple[Any, ...], ...]


def attacks(client: redis.Redis, seed: int) -> list[Attack]:
    """Return the attacks on the store of a client."""
    values: list[str | bytes] = [*texts(), b"\xff"]
    named = [
        *_types(),
        *(pair for value in values for pair in _values(value)),
        *(pair for head in heads(random.Random(seed)) for pair in _heads(head)),
        *_notices(),
    ]
    return [Attack(name[:300], partial(_run, client, commands)) for name, commands in named]


def _types() -> Iterator[tuple[str, Commands]]:
    for key in KEYS:
        for words in (
            ("SET", key, "x"),
            ("HSET", key, "a", "b"),
            ("RPUSH", key, "x"),
            ("SADD", key, "x"),
            ("ZADD", key, "1", "x"),
        ):
            yield f"{key} by {words[0]}", (("DEL", key), words)
        yield f"no {key}", (("DEL", key),)


def _values(value: str | bytes) -> Iterator[tuple[str, Commands]]:
    for field in ("beat", "granted", "seen", "lease:x", "about:x", "note:x"):
        yield f"meta {field}={value!r}", (("HSET", f"{BASE}meta", field, value),)
    yield f"queues has {value!r}", (("SADD", "aiotaskq:queues", value),)
    yield f"levels has {value!r}", (("SADD", f"{BASE}levels", value),)
    yield f"a letter {value!r}", (("HSET", f"{BASE}letters", value, value),)
    yield f"a schedule {value!r}", (("HSET", "aiotaskq:schedules", value, value),)
    yield f"a token {value!r}", (("RPUSH", f"{BASE}wake", value),)
    for score in SCORES:
        for name in ("delayed", "consumers", "fenced", "dead"):
            yield f"{name} has {value!r} at {score}", (("ZADD", BASE + name, score, value),)
        for name in ("cancelled", "schedules:due"):
            key = f"aiotaskq:{name}"
            yield f"{name} has {value!r} at {score}", (("ZADD", key, score, value),)
    yield (
        f"a forged consumer {value!r}",
        (
            ("ZADD", f"{BASE}consumers", "9e15", value),
            ("HSET", f"{BASE}meta", b"about:" + _bytes(value), value),
        ),
    )
    yield (
        f"a fenced consumer that holds {value!r}",
        (
            ("ZADD", f"{BASE}fenced", "1", "forged"),
            ("HSET", f"{BASE}held:forged", value, value, "1", value),
        ),
    )


def _heads(head: bytes) -> Iterator[tuple[str, Commands]]:
    yield f"ready has {head[:50]!r}", (("RPUSH", f"{BASE}ready", head, head + message()),)
    yield (
        f"ready:7 has {head[:50]!r}",
        (("RPUSH", f"{BASE}ready:7", head + message()), ("SADD", f"{BASE}levels", "7")),
    )
    yield f"delayed has {head[:50]!r}", (("ZADD", f"{BASE}delayed", "1", head + message()),)
    yield (
        f"a suspect {head[:50]!r}",
        (("RPUSH", f"{BASE}ready:suspects", head), ("SADD", f"{BASE}levels", "suspects")),
    )


def _notices() -> Iterator[tuple[str, Commands]]:
    for notice in (*NOTICES, b"[" * 100_000 + b"]" * 100_000):
        yield f"the notice {notice[:50]!r}", (("PUBLISH", "aiotaskq:results", notice),)


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _run(client: redis.Redis, commands: Commands) -> None:
    for words in commands:
        try:
            client.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py's
        except redis.ResponseError as error:
            # What was there before is of another type: then that is the hostile entry.
            if "WRONGTYPE" not in str(error):
                raise
