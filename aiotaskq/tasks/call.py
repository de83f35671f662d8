"""`Call`: a task with its arguments, checked and not yet sent."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from aiotaskq.tasks.options import CallOptions

R_co = TypeVar("R_co", covariant=True)  # so that calls of several types fit one list


class Call(msgspec.Struct, Generic[R_co], frozen=True):
    """A task with its arguments, checked and not yet sent; `task.s(...)` returns one."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: CallOptions
