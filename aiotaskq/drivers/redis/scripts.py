"""The scripts that the server runs: each is one atomic step. See `lua/`, one file per operation."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

_FOLDER = Path(__file__).parent / "lua"
_SHARED = (_FOLDER / "shared.lua").read_text("ascii")


class Script(msgspec.Struct, frozen=True):
    """A script and the name that the server keeps it under."""

    source: bytes
    digest: bytes


def _load(name: str) -> Script:
    source = (_SHARED + (_FOLDER / f"{name}.lua").read_text("ascii")).encode()
    digest = hashlib.sha1(source, usedforsecurity=False).hexdigest()
    return Script(source, digest.encode())


CANCEL = _load("cancel")
CLOSE = _load("close")
DEPTH = _load("depth")
DONE = _load("done")
FETCH = _load("fetch")
OPEN = _load("open")
PUBLISH = _load("publish")
PURGE = _load("purge")
RENEW = _load("renew")
SETTLE = _load("settle")
STORE = _load("store")
TEND = _load("tend")
