"""Fixtures of the tests of the worker."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import pytest

from aiotaskq import TaskQueue

# Sentry's client looks for eventlet, whose import warns of itself, and of each fork from then on.
# The tests of eventlet run programs of their own.
sys.modules.setdefault("eventlet", None)  # type: ignore[arg-type]  # so Python raises ImportError


@pytest.fixture
async def app() -> AsyncIterator[TaskQueue]:
    """An application with a memory store of its own."""
    app = TaskQueue("app", broker="memory://")
    yield app
    await app.close()
