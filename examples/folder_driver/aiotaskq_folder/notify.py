"""Waking those who wait: a named pipe for each, in whatever process they are.

Theory of operation. Whoever waits makes a pipe in `wake/<topic>`. A call that has changed something
writes a byte to each pipe there when the change is done; the byte says no more than "look again".
A process that is killed between its change and the byte wakes nobody, so those who wait also look
each second.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import suppress

from aiotaskq.errors import Unavailable
from aiotaskq_folder.connection import FolderConnection, in_thread

LOOK = 1.0  # seconds between looks that rely on no notice
MESSAGES, RESULTS = "messages", "results"  # topics


class FolderNotifier:
    """The pipe of one who waits."""

    def __init__(self, folder: FolderConnection, topic: str) -> None:
        self.folder = folder
        self._name = f"wake/{topic}/{secrets.token_hex(8)}"
        self._pipe: int | None = None
        self._event = asyncio.Event()

    async def open(self) -> None:
        """Begin to be woken."""
        pipe = await self._make()
        asyncio.get_running_loop().add_reader(pipe, self._hear, pipe)

    async def wait(self, seconds: float) -> None:
        """Return when there was a notice since the last call, or after some seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()

    def wake(self) -> None:
        """Wake the one who waits, who is on the same event loop."""
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
            # For writing as well: else the pipe would end when others close their ends.
            self._pipe = os.open(self.folder.root / new, os.O_RDWR | os.O_NONBLOCK)
            self.folder.move([(new, self._name)])
        return self._pipe

    @in_thread
    def _remove(self) -> None:
        self.folder.move([(self._name, None)])

    def _hear(self, pipe: int) -> None:
        with suppress(BlockingIOError):
            os.read(pipe, 65536)
        self._event.set()
