"""The suites of aiotaskq, over a folder."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from folder_harness import FolderHarness

from aiotaskq.testing import BrokerConformance, ResultConformance, check_broker


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[FolderHarness]:
    harness = FolderHarness(tmp_path)
    yield harness
    await harness.close()


class TestFolderBroker(BrokerConformance):
    pass


class TestFolderBackend(ResultConformance):
    pass


def test_random_histories_agree_with_the_model(tmp_path: Path) -> None:
    numbers = itertools.count()

    def harness() -> FolderHarness:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return FolderHarness(folder)

    check_broker(harness, examples=30, steps=30)
