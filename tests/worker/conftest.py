"""Fixtures of the tests of the worker."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from aiotaskq import TaskQueue


@pytest.fixture
async def app() -> AsyncIterator[TaskQueue]:
    """An application with a memory store of its own."""
    app = TaskQueue("app", broker="memory://")
    yield app
    await app.close()
