"""`aiotaskq call`: send one task."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import choose_app, run_with_app
from aiotaskq.cli.result import Timeout, Wait, check_keeps_results, print_result, wait_for
from aiotaskq.config.names import nearest
from aiotaskq.errors import ConfigError
from aiotaskq.tasks.option_table import OPTIONS
from aiotaskq.tasks.options import CallOptions
from aiotaskq.tasks.result import TaskResult


def _call_option(flag: str, name: str) -> Any:
    """Return the flag of an option of calls, whose help is the meaning in the table of options."""
    return typer.Option(flag, help=OPTIONS[name].meaning.replace("``", "`"))


# Also options of `aiotaskq schedule add`.
Queue = Annotated[str | None, _call_option("--queue", "queue")]
Priority = Annotated[int | None, _call_option("--priority", "priority")]
Keywords = Annotated[
    list[str] | None,
    typer.Option("-k", "--keyword", metavar="NAME=VALUE", help="A keyword argument."),
]


def call(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="APP TASK [ARGUMENT]...",
            help="The application, the name of the task, and its arguments: each is JSON, or else"
            " text. Put -- before a negative number.",
            show_default=False,
        ),
    ],
    keywords: Keywords = None,
    queue: Queue = None,
    countdown: Annotated[float | None, _call_option("--countdown", "countdown")] = None,
    expires: Annotated[float | None, _call_option("--expires", "expires")] = None,
    priority: Priority = None,
    task_id: Annotated[str | None, _call_option("--task-id", "task_id")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Send it even if no task of this name is registered here."),
    ] = False,
    wait: Wait = False,
    timeout: Timeout = None,
) -> None:
    """Send a task, and print its id or its result.

    [bold]aiotaskq call tasks:app tasks.add 2 8 --wait[/bold]

    Exit status 1: the task failed. 3: no result in time.
    """
    target, words = choose_app(context, words)
    if not words:
        raise ConfigError(f"which task? aiotaskq call {target} module.function ARGUMENT...")
    name, *texts = words
    options: dict[str, Any] = {
        "queue": queue,
        "countdown": countdown,
        "expires": expires,
        "priority": priority,
        "task_id": task_id,
    }
    chosen: CallOptions = {k: v for k, v in options.items() if v is not None}  # type: ignore[assignment]  # keys of CallOptions

    waits = wait or timeout is not None

    async def work(app: TaskQueue) -> TaskResult[Any] | str:
        args = [read_argument(text) for text in texts]
        if waits:
            check_keeps_results(app, target)
        if name not in app.tasks and not force:
            meant = nearest(name, app.tasks)
            hint = "." if meant is None else f"; did you mean {meant!r}?"
            raise ConfigError(
                f"{target} has no task {name!r}{hint} With --force it is sent, for the workers of"
                " another application"
            )
        try:
            handle = await app.send(name, args, read_keywords(keywords or []), **chosen)
        except TypeError as error:  # the task is registered here and the call does not fit it
            raise ConfigError(str(error)) from error
        return await wait_for(handle, timeout) if waits else handle.id

    print_result(run_with_app(target, work))


def read_argument(text: str) -> Any:
    """Return the value of an argument of a task: JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_keywords(pairs: list[str]) -> dict[str, Any]:
    """Return the keyword arguments of a task, each given as name=value."""
    keywords = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"{pair!r} is no keyword argument; write it as name=value")
        keywords[name] = read_argument(text)
    return keywords
