"""Wake-ups of waiting consumers and subscribers in all processes, through named pipes.

Theory of operation. Each waiting object creates a named pipe in `wake/<topic>`. A call that has
changed something writes one byte into each of these pipes after the change. The byte only means
"look again". Nobody sends it if the process is killed between the change and the byte, so waiting
objects also look once a second.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import suppress

from aiotaskq.errors import Unavailable
from aiotaskq_folder.connection import FolderConnection, in_thread

LOOK = 1.0  # seconds between looks without a wake-up
MESSAGES, RESULTS = "messages", "results"  # topics


class FolderNotifier:
    """The named pipe of one waiting consumer or subscriber."""

    def __init__(self, folder: FolderConnection, topic: str) -> None:
        self.folder = folder
        self._name = f"wake/{topic}/{secrets.token_hex(8)}"
        self._pipe: int | None = None
        self._event = asyncio.Event()

    async def open(self) -> None:
        """Create the pipe."""
        pipe = await self._make()
        asyncio.get_running_loop().add_reader(pipe, self._read, pipe)

    async def wait(self, seconds: float) -> None:
        """Wait for a wake-up since the last call, for some seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()

    def wake(self) -> None:
        """Wake the waiting object from its own event loop."""
        self._event.set()

    async def close(self) -> None:
        """Remove the pipe. Idempotent, never raises."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            asyncio.get_running_loop().remove_reader(pipe)
            os.close(pipe)
            with suppress(Unavailable):
                await self._remove()

    @in_thread
    def _make(self) -> int:
        if self._pipe is None:
            new = f"new/{secrets.token_hex(8)}"
            os.mkfifo(self.folder.root / new)
            # Opened for writing as well: otherwise it would end when other writers close it.
            self._pipe = os.open(self.folder.root / new, os.O_RDWR | os.O_NONBLOCK)
            self.folder.move([(new, self._name)])
        return self._pipe

    @in_thread
    def _remove(self) -> None:
        self.folder.move([(self._name, None)])

    def _read(self, pipe: int) -> None:
        with suppress(BlockingIOError):
            os.read(pipe, 65536)
        self._event.set()
