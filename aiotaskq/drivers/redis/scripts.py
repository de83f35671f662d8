"""The scripts that the server runs: each is one atomic step. See `lua/`, one file per operation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from aiotaskq.contract.message import SUSPECT

_FOLDER = Path(__file__).parent / "lua"
_SHARED = f"local SUSPECT = {SUSPECT}\n" + (_FOLDER / "shared.lua").read_text("ascii")


class Script(msgspec.Struct, frozen=True):
    """A script and the name that the server keeps it under."""

    source: bytes
    digest: bytes
    firm: bool  # what it writes is to outlive the server, where the address asks for replicas


def _load(*names: str, firm: bool = False, shared: str = _SHARED) -> Script:
    parts = ((_FOLDER / f"{name}.lua").read_text("ascii") for name in names)
    source = "".join((shared, *parts)).encode()
    digest = hashlib.sha1(source, usedforsecurity=False).hexdigest()
    return Script(source, digest.encode(), firm)


ARRIVED = _load("arrived", firm=True)
CANCEL = _load("cancel", firm=True)
CLOSE = _load("close")
CONSUMERS = _load("consumers")
DEAD = _load("dead")
DEPTH = _load("depth")
DISCARD = _load("discard", firm=True)
DONE = _load("done", firm=True)
DUE = _load("due")
END = _load("reclaim", "end")
FETCH = _load("fetch")
LOAD = _load("load")
NEWS = _load("news")
NUDGE = _load("nudge")
OPEN = _load("open")
PACK = _load("pack", firm=True)
PEEK = _load("peek", shared="")  # which would be most of its work
PUBLISH = _load("publish", firm=True)
PURGE = _load("purge")
RENEW = _load("renew")
REVIVE = _load("revive", firm=True)
SETTLE = _load("settle", firm=True)
STORE = _load("store", firm=True)
SWAP = _load("swap", firm=True)
SWEEP = _load("sweep")
TEND = _load("reclaim", "tend")
UNPACK = _load("unpack", firm=True)
