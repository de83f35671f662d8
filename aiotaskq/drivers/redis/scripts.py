"""The scripts that the server runs: each is one atomic step. See `lua/`, one file per operation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from aiotaskq.message import SUSPECT

_FOLDER = Path(__file__).parent / "lua"
_SHARED = f"local SUSPECT = {SUSPECT}\n" + (_FOLDER / "shared.lua").read_text("ascii")


class Script(msgspec.Struct, frozen=True):
    """A script and the name that the server keeps it under."""

    source: bytes
    digest: bytes


def _load(*names: str) -> Script:
    parts = ((_FOLDER / f"{name}.lua").read_text("ascii") for name in names)
    source = "".join((_SHARED, *parts)).encode()
    digest = hashlib.sha1(source, usedforsecurity=False).hexdigest()
    return Script(source, digest.encode())


CANCEL = _load("cancel")
CLOSE = _load("close")
CONSUMERS = _load("consumers")
DEAD = _load("dead")
DEPTH = _load("depth")
DISCARD = _load("discard")
DONE = _load("done")
END = _load("reclaim", "end")
FETCH = _load("fetch")
NEWS = _load("news")
OPEN = _load("open")
PUBLISH = _load("publish")
PURGE = _load("purge")
RENEW = _load("renew")
REVIVE = _load("revive")
SETTLE = _load("settle")
STORE = _load("store")
SWEEP = _load("sweep")
TEND = _load("reclaim", "tend")
