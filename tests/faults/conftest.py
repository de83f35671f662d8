"""The scene of a test, over each broker."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from zlib import crc32

import pytest

from aiotaskq import TaskQueue
from tests.faults.scene import LONG_PROFILE, Scene, choose_seed
from tests.servers import Watchdog

BROKERS = ("sqlite", "redis")

# As long as asked for: `make soak` has the minutes.
collect_ignore = [] if "AIOTASKQ_TESTS_SOAK_MINUTES" in os.environ else ["test_soak.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test here the time of its profile; in the short one each has one broker of two."""
    here = Path(__file__).parent
    left_out = [] if LONG_PROFILE else [item for item in items if _is_left_out(item, items)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        plays = "scene" in getattr(item, "fixturenames", ())
        if plays:
            item.add_marker("slow")
        if item.get_closest_marker("timeout") is None and (plays or LONG_PROFILE):
            item.add_marker(pytest.mark.timeout(1200 if LONG_PROFILE else 600))


def _is_left_out(item: pytest.Item, items: list[pytest.Item]) -> bool:
    """Return whether a test that is there for both brokers is left out with this one.

    Which one stays depends on the name of the test alone, so that all processes of a run agree.
    """
    if not item.path.is_relative_to(Path(__file__).parent):
        return False
    name, _, parameters = item.nodeid.partition("[")
    broker = next((one for one in BROKERS if parameters.startswith((f"{one}]", f"{one}-"))), None)
    if broker is None:
        return False
    rest = parameters.removeprefix(broker)
    stays = BROKERS[crc32(f"{name}{rest}".encode()) % len(BROKERS)]
    other = f"{name}[{stays}{rest}"
    return item.nodeid != other and any(one.nodeid == other for one in items)


@pytest.fixture
def seed(record_property: Callable[[str, object], None]) -> int:
    """The seed of all random choices of a test; shown when it fails."""
    chosen = choose_seed()
    record_property("seed", chosen)
    print(f"AIOTASKQ_TESTS_FAULTS_SEED={chosen}")  # noqa: T201 - shown when the test fails
    return chosen


@pytest.fixture
def chance(seed: int) -> random.Random:
    """A random generator for tests without a nemesis."""
    return random.Random(seed)


@pytest.fixture
def long() -> bool:
    """Return whether the long profile was asked for."""
    return LONG_PROFILE


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty broker."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/queue.db"
    url: str = request.getfixturevalue("redis_url")
    TaskQueue(broker=url).drivers()  # not in a test: importing a driver reads files
    return url


@pytest.fixture
async def scene(broker: str, seed: int, tmp_path: Path, watchdog: Watchdog) -> AsyncIterator[Scene]:
    """A scene without programs yet."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    scene = Scene(broker, folder=folder, seed=seed, watchdog=watchdog)
    await scene.open()
    try:
        yield scene
    finally:
        await scene.close()
