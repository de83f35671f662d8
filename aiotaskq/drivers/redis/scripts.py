"""Scripts that the server runs, each as one atomic step; `lua/` has one file for each operation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from aiotaskq.contract.message import SUSPECT
from aiotaskq.drivers.common.retention import CALLS_FOR, UNIQUE_IDS_FOR

_FOLDER = Path(__file__).parent / "lua"
_CONSTANTS = (
    f"local SUSPECT, UNIQUE_IDS_FOR, CALLS_FOR = {SUSPECT}, {UNIQUE_IDS_FOR:.0f}, {CALLS_FOR:.0f}\n"
)
_SHARED = _CONSTANTS + (_FOLDER / "shared.lua").read_text("ascii")


class RedisScript(msgspec.Struct, frozen=True):
    """A script, and the digest by which the server knows it once it has run.

    Attributes:
        source: Its text.
        digest: The SHA-1 of the text, in hexadecimal.
        replicated: Whether its writes wait for replicas, where the URL asks for that.
    """

    source: bytes
    digest: bytes
    replicated: bool


def _load(*names: str, replicated: bool = False, shared: str = _SHARED) -> RedisScript:
    parts = ((_FOLDER / f"{name}.lua").read_text("ascii") for name in names)
    source = "".join((shared, *parts)).encode()
    digest = hashlib.sha1(source, usedforsecurity=False).hexdigest()
    return RedisScript(source, digest.encode(), replicated)


CANCEL = _load("cancel", replicated=True)
CLOSE = _load("close")
COMPARE_AND_SWAP = _load("compare_and_swap", replicated=True)
CONSUMERS = _load("consumers")
DEAD = _load("dead")
DEPTH = _load("depth")
DISCARD = _load("discard", replicated=True)
DONE = _load("done", replicated=True)
DROP_CANCELLED = _load("drop_cancelled")
DROP_PARCEL = _load("drop_parcel", replicated=True)
DUE = _load("due")
END = _load("reclaim", "end")
FETCH = _load("fetch")
LOAD = _load("load")
MAINTAIN = _load("reclaim", "maintain")
NEWS = _load("news")
OPEN = _load("open")
PACK = _load("pack", replicated=True)
PEEK = _load("peek", shared="")  # to define the shared functions would be most of its work
PUBLISH = _load("publish", replicated=True)
PURGE = _load("purge")
RENEW = _load("renew")
REVIVE = _load("revive", replicated=True)
SETTLE = _load("settle", replicated=True)
SET_ASIDE = _load("set_aside", shared="")
STORE = _load("store", replicated=True)
UNPACK = _load("unpack", replicated=True)
WAKE = _load("wake")
