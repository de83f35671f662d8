"""Fixtures of the worker's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from aiotaskq import TaskQueue


@pytest.fixture
async def app() -> AsyncIterator[TaskQueue]:
    """An application over a store in memory of its own."""
    app = TaskQueue("app", broker="memory://")
    yield app
    await app.close()
