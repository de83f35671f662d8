"""Names that nobody else has: ids of tasks, names of workers."""

from __future__ import annotations

import os
import socket
import time


def new_id() -> str:
    """Return a fresh task id: a UUID of version 7, so that ids sort by the time they were made."""
    time_text = f"{time.time_ns() // 1_000_000:012x}"
    random = os.urandom(10)
    text = random.hex()
    variant = "89ab"[random[9] & 0b11]
    return f"{time_text[:8]}-{time_text[8:12]}-7{text[:3]}-{variant}{text[3:6]}-{text[6:18]}"


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
