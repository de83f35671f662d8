"""Messages and outcomes in the memory of one process: for tests, and as a reference model."""

from __future__ import annotations

from aiotaskq.drivers.memory.broker import MemoryBroker
from aiotaskq.drivers.memory.results import MemoryBackend
from aiotaskq.drivers.memory.store import MemoryStore

__all__ = ["MemoryBackend", "MemoryBroker", "MemoryStore"]
