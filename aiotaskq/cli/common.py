"""Helpers that several commands share: which application is meant, running with it, logging."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from aiotaskq.app import TaskQueue
from aiotaskq.cli.find_app import find_app, import_tasks
from aiotaskq.cli.output import say
from aiotaskq.errors import ConfigError
from aiotaskq.readable import get_logger

T = TypeVar("T")

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

GROUP_SETTINGS = {"help_option_names": ["-h", "--help"]}
"""Context settings of every group of commands."""


@dataclass(frozen=True)
class GlobalOptions:
    """The options that stand before the command.

    Attributes:
        app: The application, as ``-A`` names it.
    """

    app: str | None


class GroupWithDefaultList(TyperGroup):
    """Commands of a group, where ``queues tasks:app`` means ``queues list tasks:app``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        wants_help = any(word in ("-h", "--help") for word in args[:1])
        if not wants_help and (not args or args[0] not in self.commands):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def choose_app(context: typer.Context, words: list[str]) -> tuple[str, list[str]]:
    """Return the name of the application, from ``-A`` or the first word, and the other words."""
    options: GlobalOptions = context.obj
    if options.app is not None:
        return options.app, words
    if not words:
        raise ConfigError(
            f"which application? aiotaskq {context.command_path.split(' ', 1)[-1]} tasks:app"
        )
    return words[0], words[1:]


def only_app(context: typer.Context, words: list[str] | None) -> str:
    """Return the name of the application, for commands that take no other words."""
    target, rest = choose_app(context, words or [])
    if rest:
        raise ConfigError(f"unexpected {rest[0]!r}; options come with a dash: see --help")
    return target


def load_app(target: str) -> TaskQueue:
    """Import an application and all of its tasks.

    Raises:
        ConfigError: It cannot be imported, or other processes cannot reach its broker.
    """
    app = find_app(target)
    import_tasks(app)
    if not app.is_shared:
        raise ConfigError(
            "memory:// is seen by one process only: run `async with app.worker()` in the program"
            " that sends, or leave the broker out for an SQLite file"
        )
    return app


def run_with_app(target: str, work: Callable[[TaskQueue], Awaitable[T]]) -> T:
    """Load an application, run a coroutine with it, close it, and return the coroutine's result."""
    # Not in the event loop: a module may run one of its own while it is imported.
    app = load_app(target)

    async def run() -> T:
        try:
            return await work(app)
        finally:
            await app.close()

    return asyncio.run(run())


def print_error(message: str) -> None:
    """Print an error in one line on stderr."""
    say(f"aiotaskq: {' '.join(message.split())}", err=True)


def read_log_level(text: str) -> str:
    """Return the log level that an option names, as `logging` spells it."""
    if text.lower() not in LOG_LEVELS:
        raise ConfigError(f"no log level {text!r}; there are {', '.join(LOG_LEVELS)}")
    return text.upper()


def set_up_logging(app: TaskQueue, level: str) -> None:
    """Send the logs to stderr, unless the application sets them up itself."""
    if app.conf.worker_hijack_root_logger:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(app.conf.worker_log_format))
        logging.getLogger().handlers[:] = [handler]
        logging.getLogger().setLevel(level)
    logging.getLogger("aiotaskq").setLevel(level)
    get_logger("asyncio")  # it reports failed callbacks, with the errors of tasks
