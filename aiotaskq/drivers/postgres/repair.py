"""What becomes of an outcome that PostgreSQL cannot keep.

Its `text` and `jsonb` hold no NUL, and `jsonb` no number beyond its range either. A task that
returns such a value must neither lose its outcome nor hold up those that are stored with it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Raw

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import Outcome, RemoteError, TaskStatus


def storable(text: str) -> bool:
    """Whether PostgreSQL's `text` can hold it."""
    return cleaned(text) == text


def tidied(outcome: Outcome) -> Outcome:
    r"""Return it with NUL shown as ``\x00`` in what is only for people, and without arguments.

    An error is for people too; what a task returned is not, and stays as it is.
    """
    result = outcome.result if outcome.status is TaskStatus.SUCCESS else _shown(outcome.result)
    return msgspec.structs.replace(
        outcome,
        result=result,
        traceback=_clean_or_none(outcome.traceback),
        name=_clean_or_none(outcome.name),
        worker=_clean_or_none(outcome.worker),
        queue=_clean_or_none(outcome.queue),
        children=[cleaned(child) for child in outcome.children],
        args=UNSET,
        kwargs=UNSET,
        history=tuple(map(_tidied_attempt, outcome.history)),
    )


def replaced(outcome: Outcome, reason: str) -> Outcome:
    """Return a failure in its place that says why it could not be kept."""
    what = "result" if outcome.status is TaskStatus.SUCCESS else "error"
    message = f"PostgreSQL cannot keep the {what} of this task: {cleaned(reason)}"
    error = RemoteError("EncodeError", [message], "aiotaskq.errors")
    status = outcome.status if outcome.status is not TaskStatus.SUCCESS else TaskStatus.FAILURE
    return msgspec.structs.replace(
        tidied(outcome), status=status, result=Raw(msgspec.json.encode(error))
    )


def _tidied_attempt(attempt: Attempt) -> Attempt:
    return msgspec.structs.replace(
        attempt,
        worker=cleaned(attempt.worker),
        error=cleaned(attempt.error),
        traceback=cleaned(attempt.traceback),
    )


def _shown(raw: Raw) -> Raw:
    try:
        return Raw(msgspec.json.encode(_walk(msgspec.json.decode(bytes(raw)))))
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return raw  # no JSON: it will be replaced


def _walk(value: Any) -> Any:
    if isinstance(value, str):
        return cleaned(value)
    if isinstance(value, list):
        return [_walk(item) for item in value]
    if isinstance(value, dict):
        return {cleaned(str(key)): _walk(item) for key, item in value.items()}
    return value


def _clean_or_none(text: str | None) -> str | None:
    return None if text is None else cleaned(text)


def cleaned(text: str) -> str:
    """Return it with what PostgreSQL's `text` cannot hold shown in another way."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
