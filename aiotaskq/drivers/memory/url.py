"""URLs of stores in memory, and the stores that they name."""

from __future__ import annotations

import threading
from urllib.parse import SplitResult, urlsplit

from aiotaskq.drivers.common.url import masked_account
from aiotaskq.drivers.memory.store import MemoryStore
from aiotaskq.errors import ConfigError

_lock = threading.Lock()
_named_stores: dict[tuple[str, str], MemoryStore] = {}  # by prefix and name


def find_store(url: str, prefix: str, store: MemoryStore | None) -> tuple[str, MemoryStore]:
    """Return the URL to show and the store that it names.

    ``memory://name`` names one store of the process for each prefix; ``memory://`` names a new
    store each time. A store that is given goes before both.

    Raises:
        ConfigError: It is not such a URL.
    """
    parts = _split(url)
    # A name may stand behind a user and a password, which mean nothing here.
    name = (parts.netloc + parts.path).rpartition("@")[2].strip("/")
    shown = f"memory://{masked_account(name)}"
    if store is not None:
        return shown, store
    if not name:
        return shown, MemoryStore()
    with _lock:
        return shown, _named_stores.setdefault((prefix, name), MemoryStore())


def _split(url: str) -> SplitResult:
    # No error shows the URL: with another scheme, there may be a password in it.
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if parts.scheme != "memory" or parts.query or parts.fragment:
        raise ConfigError("a store in memory is memory:// or memory://name")
    return parts
