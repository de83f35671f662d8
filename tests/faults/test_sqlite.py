"""One SQLite file with many processes: killed while they write, and on a full disk."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.checker import Allowed
from tests.faults.ledger import Acknowledged, Attempted, Ended
from tests.faults.scene import PATIENCE, Scene, scaled

DISK = 8  # MiB


async def play(scene: Scene) -> None:
    scene.set(max_crashes=50)
    await scene.fleet.worker("-c", "20", processes=4)


@pytest.mark.parametrize("broker", ["sqlite"], indirect=True)
async def test_t33_processes_are_killed_while_they_write(scene: Scene) -> None:
    await play(scene)
    for _ in range(2):
        scene.producer(*scene.mix(scaled(250, 4000)), rate=scaled(150, 80))
    await scene.nemesis.run(
        [scene.nemesis.kill_worker()], times=scaled(6, 60), every=(0.05, scaled(0.3, 1.0))
    )
    await scene.drain()
    await scene.check()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no disk may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The file on the small disk where a test asks for it."""
    if "disk" not in request.fixturenames:
        return f"sqlite:///{tmp_path}/queue.db"
    disk: Path = request.getfixturevalue("disk")
    return f"sqlite:///{disk}/queue.db"


async def test_t33_the_disk_is_full_for_a_while(scene: Scene, disk: Path) -> None:
    await play(scene)
    scene.producer(*scene.mix(scaled(400, 4000)), rate=100)
    await scene.ledger.count(Ended, 20, within=PATIENCE)
    with scene.nemesis.lasting("disk full"):
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 65536)
        # A call has to be refused before there is room again.
        await scene.until_anybody_logged("disk is full", within=PATIENCE)
        ballast.unlink()
    await scene.drain()
    await scene.check(Allowed(drain=2 * PATIENCE))
    assert len(scene.ledger.of(Acknowledged)) > len(scene.ledger.of(Attempted)) // 2
