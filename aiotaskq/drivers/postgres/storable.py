"""Outcomes that PostgreSQL can store, in place of outcomes that it cannot.

Its types `text` and `jsonb` cannot contain a NUL, and `jsonb` no number beyond its range. A task
that returns such a value must not lose its outcome, and must not hold up the outcomes that are
stored in the same batch.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Raw

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, RemoteError, TaskStatus


def storable_text(text: str) -> str:
    """Return the text with escapes for the characters that `text` cannot contain."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def is_storable(text: str) -> bool:
    """Return whether PostgreSQL's `text` can contain this text unchanged."""
    return storable_text(text) == text


def storable_outcome(outcome: Outcome) -> Outcome:
    r"""Return the outcome without arguments, and with NUL as ``\x00`` in all that people read.

    People read an error too. A value that the task returned may not change: where it contains a
    NUL, its JSON is stored as text, which the codec reads.
    """
    convert = _as_text if outcome.status is TaskStatus.SUCCESS else _storable
    result = convert(outcome.result)
    return msgspec.structs.replace(
        outcome,
        result=result,
        traceback=_storable_text(outcome.traceback),
        name=_storable_text(outcome.name),
        worker=_storable_text(outcome.worker),
        queue=_storable_text(outcome.queue),
        children=[storable_text(child) for child in outcome.children],
        args=UNSET,
        kwargs=UNSET,
        history=tuple(map(_storable_attempt, outcome.history)),
    )


def failure_in_place_of(outcome: Outcome, reason: str) -> Outcome:
    """Return an outcome with an error that says why the real one could not be stored."""
    what = "result" if outcome.status is TaskStatus.SUCCESS else "error"
    message = f"PostgreSQL cannot keep the {what} of this task: {storable_text(reason)}"
    error = RemoteError("EncodeError", [message], "aiotaskq.errors")
    status = outcome.status if outcome.status is not TaskStatus.SUCCESS else TaskStatus.FAILURE
    return msgspec.structs.replace(
        storable_outcome(outcome), status=status, result=Raw(msgspec.json.encode(error))
    )


def _storable_attempt(attempt: Attempt) -> Attempt:
    return msgspec.structs.replace(
        attempt,
        worker=storable_text(attempt.worker),
        error=storable_text(attempt.error),
        traceback=storable_text(attempt.traceback),
    )


def _as_text(raw: Raw) -> Raw:
    encoded = bytes(raw)
    if rb"\u0000" not in encoded:
        return raw
    try:
        msgspec.json.decode(encoded)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return raw  # not JSON: a failure will take its place
    return Raw(msgspec.json.encode({"$text": encoded.decode()}))


def _storable(raw: Raw) -> Raw:
    try:
        return Raw(msgspec.json.encode(_storable_value(msgspec.json.decode(bytes(raw)))))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return raw  # not JSON: a failure will take its place


def _storable_value(value: Any) -> Any:
    if isinstance(value, str):
        return storable_text(value)
    if isinstance(value, list):
        return [_storable_value(item) for item in value]
    if isinstance(value, dict):
        return {storable_text(str(key)): _storable_value(item) for key, item in value.items()}
    return value


def _storable_text(text: str | None) -> str | None:
    return None if text is None else storable_text(text)
