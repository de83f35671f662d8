"""The harness of a folder for the suites: its clock, and a way to make it unreachable."""

from __future__ import annotations

import time
from pathlib import Path

from aiotaskq_folder import FolderBackend, FolderBroker

# What may stay: it goes when its time is over.
PASSING = ("marks", "results")


class FolderHarness:
    """Drivers on a folder, and a clock that they all go by.

    Args:
        folder: Where the folder of the drivers is to be.
        options: At the end of the URL. A suite writes tens of thousands of files; to have each
            written through to the disk would take minutes.
    """

    can_cut = True
    can_stall = False  # there is no server that could stand still

    def __init__(self, folder: Path, options: str = "?fsync=false") -> None:
        self.path = folder / "store"
        self._url = f"folder://{self.path}{options}"
        self._shift = 0.0
        self._made: list[FolderBroker | FolderBackend] = []

    def clock(self) -> float:
        return time.time() + self._shift

    async def broker(self) -> FolderBroker:
        broker = FolderBroker(self._url, clock=self.clock)
        self._made.append(broker)
        await broker.open()
        return broker

    async def backend(self) -> FolderBackend:
        backend = FolderBackend(self._url, clock=self.clock)
        self._made.append(backend)
        await backend.open()
        return backend

    async def pass_time(self, seconds: float) -> None:
        self._shift += seconds

    async def now(self) -> float:
        return self.clock()

    async def cut(self) -> None:
        self.path.rename(self.path.with_name("away"))
        self.path.touch()  # a file, so that nobody makes the folder anew

    async def mend(self) -> None:
        self.path.unlink()
        self.path.with_name("away").rename(self.path)

    async def stall(self, seconds: float) -> None:
        raise NotImplementedError

    async def leaks(self) -> list[str]:
        root = self.path / "aiotaskq"
        files = [path.relative_to(root) for path in root.rglob("*") if not path.is_dir()]
        return [str(one) for one in files if one.parts[0] not in (*PASSING, "lock")]

    async def close(self) -> None:
        for driver in self._made:
            await driver.close()
