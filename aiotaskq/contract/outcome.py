"""Outcomes: status, value or error of a task, as a result backend stores them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from aiotaskq.contract.message import Attempt


class TaskStatus(StrEnum):
    """The status of a task, with Celery's names."""

    PENDING = "PENDING"  # it waits, or nothing is known of it
    STARTED = "STARTED"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"

    def __init__(self, _: str) -> None:
        self.final = self.value in ("SUCCESS", "FAILURE", "REVOKED")
        """The mark of an ended task: no other status follows."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Status, value or error of a task. Result stores keep it field by field.

    `result` is encoded by the result serializer. With SUCCESS it is the value that the task
    returned; with FAILURE, RETRY and REVOKED it is a `RemoteError`.
    """

    task_id: str
    status: TaskStatus
    result: Raw
    traceback: str | None = None
    children: list[str] = []
    date_done: datetime | None = None  # aware, UTC
    name: str | None = None
    worker: str | None = None
    queue: str | None = None
    retries: int = 0
    execution_time: float | None = None  # seconds
    args: Raw | UnsetType = UNSET
    kwargs: Raw | UnsetType = UNSET
    history: tuple[Attempt, ...] = ()  # earlier attempts; the latest ones, if there were many
    reply_to: str | UnsetType = UNSET  # that of the `Message`, if it has one


class RemoteError(msgspec.Struct, frozen=True, omit_defaults=True):
    """An exception in `Outcome.result`, in the same form as Celery stores it.

    The fields that Celery has not are left out where they say nothing more.
    """

    exc_type: str
    exc_message: list[Any]
    exc_module: str
    exc_args: list[Any] | None = None  # its arguments; None: `exc_message` has them
    exc_attributes: dict[str, Any] | None = None
    exc_members: list[RemoteError] | None = None  # of an exception group
