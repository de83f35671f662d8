"""From a URL to a store."""

from __future__ import annotations

import threading
from urllib.parse import urlsplit

from aiotaskq.drivers.memory.store import MemoryStore
from aiotaskq.errors import ConfigError

_lock = threading.Lock()
_shared: dict[tuple[str, str], MemoryStore] = {}


def find(url: str, prefix: str, store: MemoryStore | None) -> tuple[str, MemoryStore]:
    """Return the URL to show and the store that it names.

    ``memory://name`` is one store for the whole process, for each prefix; ``memory://`` is a
    new one each time. A store that was given goes before both.

    Raises:
        ConfigError: It is no such URL.
    """
    parts = urlsplit(url)
    if parts.scheme != "memory" or parts.query or parts.fragment:
        raise ConfigError("a store in memory is memory:// or memory://name")
    name = (parts.netloc + parts.path).rpartition("@")[2].strip("/")
    shown = f"memory://{name}"
    if store is not None:
        return shown, store
    if not name:
        return shown, MemoryStore()
    with _lock:
        return shown, _shared.setdefault((prefix, name), MemoryStore())
