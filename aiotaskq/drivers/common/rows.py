"""Records of the contract, made from rows of SQL tables, for drivers that have such tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.records import Depth
from aiotaskq.errors import DecodeError

OUTCOME_COLUMNS = (
    "task_id, status, result, date_done, traceback, name, args, kwargs, worker, retries, queue,"
    " execution_time, children, history"
)
"""The columns of a stored outcome, in the order that `read_outcome` takes."""

_decode_children = msgspec.json.Decoder(list[str]).decode


def read_outcome(row: Iterable[Any]) -> Outcome:
    """Return the outcome that a row with `OUTCOME_COLUMNS` holds.

    Encoded values may be text or bytes, a time may be text in ISO 8601.

    Raises:
        DecodeError: Another program wrote the row, and it is not an outcome.
    """
    task_id, status, result, done, traceback, name, args, kwargs, *rest = row
    worker, retries, queue, execution_time, children, history = rest
    try:
        for text in (task_id, traceback, name, worker, queue):
            if not isinstance(text, str | None):
                raise TypeError(f"{text!r:.100} is no text")
        for number in (retries, execution_time):
            if not isinstance(number, int | float | None):
                raise TypeError(f"{number!r:.100} is no number")
        return Outcome(
            task_id=task_id,
            status=TaskStatus(status),
            result=Raw(b"null") if result is None else _raw(result),
            date_done=_read_time(done),
            traceback=traceback,
            name=name,
            args=UNSET if args is None else _raw(args),
            kwargs=UNSET if kwargs is None else _raw(kwargs),
            worker=worker,
            retries=retries or 0,
            queue=queue,
            execution_time=execution_time,
            children=_decode_children(children or "[]"),
            history=_read_history(history) if history else (),
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise DecodeError(f"the row of {task_id!r:.200} is not an outcome: {error}") from error


def write_history(attempts: Sequence[Attempt]) -> str | None:
    """Return the column `history` of an outcome; None without earlier attempts."""
    # The standard library also writes lone surrogates, which msgspec refuses.
    return json.dumps(msgspec.to_builtins(attempts)) if attempts else None


def count_depths(counts: Iterable[tuple[str, str, int]]) -> dict[str, Depth]:
    """Return the depth of each queue, given counts by queue and state.

    Args:
        counts: Names of queues, names of the fields of `Depth`, and counts to add up.
    """
    found: dict[str, dict[str, int]] = {}
    for queue, state, count in counts:
        if count:
            states = found.setdefault(queue, {})
            states[state] = states.get(state, 0) + count
    return {queue: Depth(**states) for queue, states in found.items()}


def _read_time(done: object) -> datetime | None:
    if isinstance(done, str):
        done = datetime.fromisoformat(done)
    if done is None:
        return None
    if not isinstance(done, datetime):
        raise TypeError(f"{done!r:.100} is no time")
    return done if done.tzinfo is not None else done.replace(tzinfo=UTC)


def _raw(value: str | bytes) -> Raw:
    return Raw(value.encode() if isinstance(value, str) else value)


def _read_history(text: str) -> tuple[Attempt, ...]:
    return msgspec.convert(json.loads(text), tuple[Attempt, ...])
