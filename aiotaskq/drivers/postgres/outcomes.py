"""Outcomes as rows of the table of results; `aiotaskq.drivers.common.rows` reads them."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw, UnsetType

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.common.rows import write_history


def size_of(outcome: Outcome) -> int:
    """Return about how many bytes an outcome takes in a statement."""
    values = (outcome.result, outcome.args, outcome.kwargs)
    size = sum(len(bytes(raw)) for raw in values if raw)
    return size + len(outcome.traceback or "") + sum(len(one.traceback) for one in outcome.history)


def row_of(outcome: Outcome) -> tuple[Any, ...]:
    """Return the columns of an outcome, in the order of `OUTCOME_COLUMNS`."""
    return (
        outcome.task_id,
        str(outcome.status),
        _json(outcome.result),
        outcome.date_done,
        outcome.traceback,
        outcome.name,
        _json(outcome.args),
        _json(outcome.kwargs),
        outcome.worker,
        outcome.retries,
        outcome.queue,
        outcome.execution_time,
        msgspec.json.encode(outcome.children).decode(),
        # PostgreSQL refuses lone surrogates, and the outcome is stored in another form.
        write_history(outcome.history) if outcome.history else None,
    )


def _json(raw: Raw | UnsetType) -> str | None:
    # Bytes that are not UTF-8 are not JSON either, and PostgreSQL refuses them as such.
    return None if isinstance(raw, UnsetType) else bytes(raw).decode("utf-8", "surrogateescape")
