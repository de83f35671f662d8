"""Names that nobody else has: ids of tasks, names of workers."""

from __future__ import annotations

import os
import socket
import time


def new_id() -> str:
    """Return a fresh task id: a UUID of version 7, so that ids sort by the time they were made."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    number = (
        (milliseconds & 0xFFFF_FFFF_FFFF) << 80
        | 0x7 << 76
        | (random >> 68) << 64  # 12 bits
        | 0b10 << 62
        | random & 0x3FFF_FFFF_FFFF_FFFF  # 62 bits
    )
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def version() -> str:
    """Return the version of the installed package."""
    from importlib.metadata import version as installed  # costs more than most need

    return installed("aiotaskq")


def worker_name() -> str:
    """Return a name for a worker of this process, for people to read."""
    return f"{host_name()}:{os.getpid()}"


def host_name() -> str:
    """Return what this machine calls itself."""
    return socket.gethostname()
