"""Middleware: code around the sending and around the running of tasks.

A middleware may replace a message or refuse to send it, and it may replace the value or the
exception of a task. Code that only observes is better an observer (`aiotaskq.events`). Only
the methods that a middleware overrides are called, so the others cost nothing.
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
    """Base of middleware. Override one method or both."""

    async def send(self, message: Message, proceed: Send) -> None:
        """Wrap the sending of a message.

        The message is frozen: to change it, call `proceed` with a copy from
        ``msgspec.structs.replace(message, headers={...})``. To refuse it, raise: the caller gets
        the exception. If `proceed` is not called, the message is silently not sent.
        """
        await proceed(message)

    async def run(self, context: TaskContext, proceed: Run) -> Any:
        """Wrap the run of a task: `proceed` returns its value or raises its exception."""
        return await proceed(context)


def wrap_send(middlewares: Sequence[Middleware], send: Send) -> Send:
    """Return `send` wrapped by the middleware; the first one is the outermost."""
    for middleware in reversed(middlewares):
        if type(middleware).send is not Middleware.send:
            send = partial(_send, middleware, send)
    return send


def wrap_run(middlewares: Sequence[Middleware], run: Run) -> Run:
    """Return `run` wrapped by the middleware; the first one is the outermost."""
    for middleware in reversed(middlewares):
        if type(middleware).run is not Middleware.run:
            run = partial(_run, middleware, run)
    return run


def _send(middleware: Middleware, proceed: Send, message: Message) -> Awaitable[None]:
    return middleware.send(message, proceed)


def _run(middleware: Middleware, proceed: Run, context: TaskContext) -> Awaitable[Any]:
    return middleware.run(context, proceed)
