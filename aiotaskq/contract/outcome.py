"""Outcomes: what a run leaves in a result store."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from aiotaskq.contract.message import Attempt


class TaskStatus(StrEnum):
    """Where a task stands, in Celery's words."""

    PENDING = "PENDING"  # waiting, or unknown
    STARTED = "STARTED"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"

    def __init__(self, _: str) -> None:
        self.final = self.value in ("SUCCESS", "FAILURE", "REVOKED")
        """Whether nothing comes after it."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a run left behind, field by field as it rests in a result store.

    `result` holds the value in the result serializer's encoding: with SUCCESS what the task
    returned, with FAILURE or RETRY a `RemoteError`, with REVOKED a `RemoteError` that says why.
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
    history: tuple[Attempt, ...] = ()  # the attempts before this one; of many, the latest
    reply_to: str | UnsetType = UNSET  # as in `Message`, where that says anything


class RemoteError(msgspec.Struct, frozen=True):
    """An exception as it rests in `Outcome.result`, in the shape that Celery uses."""

    exc_type: str
    exc_message: list[Any]
    exc_module: str
