"""Seeds of the fuzzer, for any driver: values that break their readers."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec

TASK = "fuzz.good"
"""The name of the task that right messages are for."""

NOTICES = (
    b"",
    b"garbage",
    b"\xff\xfe",
    b"null",
    b"{}",
    b"[1]",
    b'["\\ud800"]',
    b'[{"task_id":1}]',
    b"[" * 5000,
    b"[" * 3000 + b"]" * 3000,
    b'"' + b"x" * 5000 + b'"',
)
"""Notices of results that no driver has sent, short enough for each of them."""

_FIELDS: tuple[dict[str, Any], ...] = (
    {"task": "nobody.knows.it"},
    {"task": ""},
    {"task": "x" * 100_000},
    {"task": "\x00\n\r\x1b[2J\u202e"},
    {"task": "nobody.knows.it", "id": "a\x00b"},
    {"task": "nobody.knows.it", "id": "\ud800"},
    {"id": ""},
    {"id": "\n" * 10},
    {"id": "x" * 100_000},
    {"args": ["\ud800"]},
    {"args": [10**400]},
    {"args": {"key": "a"}},
    {"args": [1, 2, 3, 4]},
    {"kwargs": {"__class__": 1, "self": 2}},
    {"attempt": -(2**63)},
    {"attempt": 2**70},
    {"attempt": "1"},
    {"priority": 10**9},
    {"timeout": -1.0},
    {"timeout": 1e308},
    {"soft_timeout": 1e-300},
    {"expires_at": -1e308},
    {"expires_at": 1e308},
    {"sent_at": 1e308},
    {"queue": "another"},
    {"queue": "x" * 10_000 + "}{"},
    {"retry": {"max_attempts": 10**30}},
    {"retry": {"max_attempts": 3, "delay": -1.0, "backoff": "evil", "max_delay": -1.0}},
    {"headers": {"a": ["b"]}},
    {"headers": {"x" * 1000: "y" * 100_000}},
    {"history": [{"number": 1, "at": 1e308, "worker": "x", "error": "y" * 1000}] * 50},
    {"unknown_for": -1e308},
    {"unknown_for": 1e308, "task": "nobody.knows.it"},
    {"reply_to": "another"},
    {"pickled": "gASVBQAAAAAAAACMAWGULg=="},
)


def message(**fields: Any) -> bytes:
    """Return a message in JSON that is right but for some fields."""
    return json.dumps({"id": "hostile", "task": TASK, "args": [1], **fields}).encode()


def bodies(chance: random.Random) -> list[bytes]:
    """Return bodies that are no message, or a message that cannot run as it says."""
    right = message()
    mutilated = []
    for _ in range(20):
        text = bytearray(right)
        for _ in range(chance.randint(1, 4)):
            text[chance.randrange(len(text))] = chance.randrange(256)
        mutilated.append(bytes(text))
    odd: tuple[Any, ...] = ({}, [], None, 0, "", True, [1, 2], {"id": 1}, {"task": TASK})
    return [
        b"",
        b"\x00" * 100,
        b"[" * 100_000,
        b"\x91" * 100_000,
        b'{"id":"a","id":"b","task":"c"}',
        right.replace(b"[1]", b"[" * 900 + b"]" * 900),
        right.replace(b"[1]", b"[" * 10_000 + b"]" * 10_000),
        right.replace(b'"hostile"', b'"\xff"'),
        message(args=["y" * 2_000_000]),
        msgspec.msgpack.encode(["no", "map"]),
        msgspec.msgpack.encode({"id": "a", "task": TASK, "timeout": float("nan")}),
        msgspec.msgpack.encode({"id": "a", "task": TASK, "expires_at": float("inf")}),
        *mutilated,
        *(right[: chance.randrange(len(right))] for _ in range(5)),
        *(chance.randbytes(2 ** chance.randrange(12)) for _ in range(10)),
        *(json.dumps(one).encode() for one in odd),
        *(message(**given) for given in _FIELDS),
    ]


def heads(chance: random.Random) -> list[bytes]:
    """Return wrong beginnings of an entry that has a readable head before its body."""
    return [
        b"",
        b"\n",
        b"0 0 -\n",
        b"0 0 - \xff\xfe\n",
        b"0 0 - %zz%0A%\n",
        b"0 0 - " + b"x" * 100_000 + b"\n",
        b"-1 -1 - a\n",
        b"1e9 0 - a\n",
        b"99999999999999999999999 0 - a\n",
        b"2:%zz%00 0 - suspect\n",
        b"0 99 - a\n",
        b"0 0 nan a\n",
        b"0 0 1e400 a\n",
        b"0 0 +1 a\n",
        *(chance.randbytes(2 ** chance.randrange(8)) for _ in range(10)),
    ]


def texts() -> list[str]:
    """Return texts that are no numbers, or numbers that nobody can calculate with."""
    return [
        *("", "x", "nan", "inf", "-inf", "1e999", "-1", "0x10", "9" * 40, "1.5", " 1", "null"),
        *("[" * 50_000, "x" * 100_000, "\x1b[2J\u202e", "a/b", "a/b/../../c", "%zz", "{}", "[1]"),
    ]
