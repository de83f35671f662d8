"""`TaskDefinition`: a registered function and its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiotaskq.tasks.arguments import Arguments
from aiotaskq.tasks.options import TaskOptions


class TaskDefinition:
    """The part of a `Task` that a worker, a scheduler and the client need.

    Attributes:
        name: The name under which it is registered, ``module.function`` by default.
        fn: The function itself.
        call: The function as a worker calls it: with ``bind=True`` the task is its first argument.
        arguments: The parameters of the function.
        options: The options given where it is defined.
    """

    name: str
    fn: Callable[..., Any]
    call: Callable[..., Any]
    arguments: Arguments
    options: TaskOptions
