"""Ids of tasks and names of workers, unique everywhere; and the version of the package."""

from __future__ import annotations

import os
import socket
import time


def new_id() -> str:
    """Return a new task id: a UUID of version 7, so ids sort by the time of their creation."""
    time_text = f"{time.time_ns() // 1_000_000:012x}"
    random = os.urandom(10)
    text = random.hex()
    variant = "89ab"[random[9] & 0b11]
    return f"{time_text[:8]}-{time_text[8:12]}-7{text[:3]}-{variant}{text[3:6]}-{text[6:18]}"


def version() -> str:
    """Return the version of the installed package."""
    from importlib.metadata import version as installed  # slow to import, and rarely needed

    return installed("aiotaskq")


def worker_name() -> str:
    """Return a name for a worker of this process, for people to read."""
    return f"{host_name()}:{os.getpid()}"


def host_name() -> str:
    """Return the name of this machine."""
    return socket.gethostname()
