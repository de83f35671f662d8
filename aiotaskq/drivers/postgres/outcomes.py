"""Outcomes as rows of the table of results, and back."""

from __future__ import annotations

import json
from typing import Any

import asyncpg
import msgspec
from msgspec import UNSET, Raw, UnsetType

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.errors import DecodeError


def size_of(outcome: Outcome) -> int:
    """Return about how many bytes an outcome takes in a statement."""
    values = (outcome.result, outcome.args, outcome.kwargs)
    size = sum(len(bytes(raw)) for raw in values if raw)
    return size + len(outcome.traceback or "") + sum(len(one.traceback) for one in outcome.history)


def row_of(outcome: Outcome) -> tuple[Any, ...]:
    """Return the columns of an outcome, in the order of `STORE` in `sql.results`."""
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
        # By the standard library, which encodes lone surrogates too. PostgreSQL refuses them, and
        # the outcome is stored in another form; msgspec would raise an error here.
        json.dumps(msgspec.to_builtins(outcome.history)) if outcome.history else None,
    )


def _json(raw: Raw | UnsetType) -> str | None:
    # Bytes that are not UTF-8 are not JSON either, and PostgreSQL refuses them as such.
    return None if isinstance(raw, UnsetType) else bytes(raw).decode("utf-8", "surrogateescape")


def outcome_of(row: asyncpg.Record) -> Outcome:
    """Return the outcome in a row.

    Raises:
        DecodeError: The row was not written by this driver, and is no outcome.
    """
    try:
        status = TaskStatus(row["status"])
        children = msgspec.json.decode(row["children"] or "[]", type=list[str])
        history = msgspec.json.decode(row["history"] or "[]", type=tuple[Attempt, ...])
    except ValueError as error:
        raise DecodeError(f"the row of {row['task_id']} is no outcome: {error}") from error
    return Outcome(
        task_id=row["task_id"],
        status=status,
        result=_raw(row["result"]) or Raw(b"null"),
        date_done=row["date_done"],
        traceback=row["traceback"],
        name=row["name"],
        args=_raw(row["args"]) or UNSET,
        kwargs=_raw(row["kwargs"]) or UNSET,
        worker=row["worker"],
        retries=row["retries"] or 0,
        queue=row["queue"],
        execution_time=row["execution_time"],
        children=children,
        history=history,
    )


def _raw(text: str | None) -> Raw | None:
    return None if text is None else Raw(text.encode())
