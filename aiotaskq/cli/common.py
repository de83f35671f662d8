"""What the commands share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from aiotaskq.app import TaskQueue
from aiotaskq.cli.target import find_app, import_tasks
from aiotaskq.errors import ConfigError

T = TypeVar("T")

LEVELS = ("debug", "info", "warning", "error", "critical")

ROOT_HELP = """A task queue for asyncio.

Write [bold]tasks.py[/bold]:

    from aiotaskq import TaskQueue
    app = TaskQueue("tasks", broker="redis://localhost:6379/0")

    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

Then start a worker, [bold]aiotaskq worker tasks:app[/bold], and send it something:
[bold]aiotaskq call tasks:app tasks.add 2 8 --wait[/bold]

APP is [bold]module:name[/bold], or a module or package that holds one TaskQueue.
As Celery users have it: [bold]aiotaskq -A tasks worker[/bold]
"""


@dataclass(frozen=True)
class Settings:
    """What was given before the command."""

    app: str | None


class DefaultToList(TyperGroup):
    """Lets ``queues tasks:app`` mean ``queues list tasks:app``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        helped = any(word in ("-h", "--help") for word in args[:1])
        if not helped and (not args or args[0] not in self.commands):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def choose_app(context: typer.Context, words: list[str]) -> tuple[str, list[str]]:
    """Return the application that is meant and the words that follow it."""
    given: str | None = context.obj.app
    if given is not None:
        return given, words
    if not words:
        raise ConfigError(
            f"which application? aiotaskq {context.command_path.split(' ', 1)[-1]} tasks:app"
        )
    return words[0], words[1:]


def only_app(context: typer.Context, words: list[str] | None) -> str:
    """Return the application that is meant, for commands that take no other words."""
    target, rest = choose_app(context, words or [])
    if rest:
        raise ConfigError(f"unexpected {rest[0]!r}; options come with a dash: see --help")
    return target


def in_app(target: str, work: Callable[[TaskQueue], Awaitable[T]]) -> T:
    """Run a coroutine with the connected application."""
    # Not in the loop: a module may use one of its own while it is imported.
    app = find_app(target)
    import_tasks(app)
    check_shared(app)

    async def run() -> T:
        try:
            return await work(app)
        finally:
            await app.close()

    return asyncio.run(run())


def check_shared(app: TaskQueue) -> None:
    """Refuse a broker that only one process sees: what is sent there would go nowhere."""
    if not app.is_shared:
        raise ConfigError(
            "memory:// is seen by one process only: run `async with app.worker()` in the program"
            " that sends, or leave the broker out for an SQLite file"
        )


def complain(message: str) -> None:
    """Say what is wrong, in one line on stderr."""
    typer.echo(f"aiotaskq: {' '.join(message.split())}", err=True)


def show(value: Any) -> str:
    """Return a value as people read it: JSON where it can be."""
    from aiotaskq.encoding.codec import encode_json
    from aiotaskq.errors import EncodeError

    try:
        return encode_json(value).decode()
    except EncodeError:
        return repr(value)


def level_of(text: str) -> str:
    """Return the log level that an option names, as `logging` has it."""
    if text.lower() not in LEVELS:
        raise ConfigError(f"no log level {text!r}; there are {', '.join(LEVELS)}")
    return text.upper()


def set_up_logging(app: TaskQueue, level: str) -> None:
    """Send the logs to stderr, unless the application sets them up itself."""
    if app.conf.worker_hijack_root_logger:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(app.conf.worker_log_format))
        logging.getLogger().handlers[:] = [handler]
        logging.getLogger().setLevel(level)
    logging.getLogger("aiotaskq").setLevel(level)
