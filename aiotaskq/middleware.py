"""Middleware: an onion around a send and around a run.

A middleware may change what happens: replace the message, refuse it, replace the value, turn
an exception into another. What only wants to hear of it is an observer (`aiotaskq.events`).
Only the methods that a middleware overrides are called, so the others cost nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from aiotaskq.context import TaskContext
from aiotaskq.contract.message import Message

Send: TypeAlias = Callable[[Message], Awaitable[None]]
Run: TypeAlias = Callable[[TaskContext], Awaitable[Any]]


class Middleware:
    """Override one method or both."""

    async def send(self, message: Message, proceed: Send) -> None:
        """Wrap the sending of a message.

        The message is frozen: pass on another one with ``msgspec.structs.replace(message,
        headers={...})``. Raising, or not calling `proceed`, keeps it from being sent; the former
        tells the caller.
        """
        await proceed(message)

    async def run(self, context: TaskContext, proceed: Run) -> Any:
        """Wrap the run of a task: `proceed` returns its value or raises what it raised."""
        return await proceed(context)


def wrap_send(middlewares: Sequence[Middleware], send: Send) -> Send:
    """Put the middlewares around `send`, the first one outermost."""
    for middleware in reversed(middlewares):
        if type(middleware).send is not Middleware.send:
            send = partial(_send, middleware, send)
    return send


def wrap_run(middlewares: Sequence[Middleware], run: Run) -> Run:
    """Put the middlewares around `run`, the first one outermost."""
    for middleware in reversed(middlewares):
        if type(middleware).run is not Middleware.run:
            run = partial(_run, middleware, run)
    return run


def _send(middleware: Middleware, proceed: Send, message: Message) -> Awaitable[None]:
    return middleware.send(message, proceed)


def _run(middleware: Middleware, proceed: Run, context: TaskContext) -> Awaitable[Any]:
    return middleware.run(context, proceed)
