"""`aiotaskq call` and `aiotaskq result`: one task from the shell."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import choose_app, in_app, show
from aiotaskq.errors import ConfigError, ResultError, ResultTimeout, TaskFailed
from aiotaskq.tasks.handle import TaskHandle
from aiotaskq.tasks.options import CallOptions
from aiotaskq.tasks.result import TaskResult

FAILED = 1
TIMED_OUT = 3

Queue = Annotated[str | None, typer.Option("--queue", help="Send it to this queue.")]
Priority = Annotated[int | None, typer.Option("--priority", help="0 to 9, 9 runs first.")]
Keywords = Annotated[
    list[str] | None,
    typer.Option("-k", "--keyword", metavar="NAME=VALUE", help="A keyword argument."),
]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Wait for the result and print it.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Seconds to wait; implies --wait.")
]


def call(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="APP TASK [ARGUMENT]...",
            help="The application, the task's name, and its arguments: each JSON, or else text."
            " Put -- before a negative number.",
            show_default=False,
        ),
    ],
    keywords: Keywords = None,
    queue: Queue = None,
    countdown: Annotated[
        float | None, typer.Option("--countdown", help="Seconds before it may start.")
    ] = None,
    expires: Annotated[
        float | None, typer.Option("--expires", help="Seconds after which it no longer starts.")
    ] = None,
    priority: Priority = None,
    task_id: Annotated[str | None, typer.Option("--task-id", help="An id of your own.")] = None,
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
        args = [value_of(text) for text in texts]
        if waits:
            check_results(app, target)
        try:
            handle = await app.send(name, args, keywords_of(keywords or []), **chosen)
        except TypeError as error:  # the task is registered here and the call does not fit it
            raise ConfigError(str(error)) from error
        if name not in app.tasks:
            typer.echo(f"{name} is not registered in {target}; sent all the same", err=True)
        return await wait_for(handle, timeout) if waits else handle.id

    report(in_app(target, work))


def result(
    context: typer.Context,
    words: Annotated[
        list[str],
        typer.Argument(metavar="APP ID", help="The application and the id of the task."),
    ],
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the task to end.")] = False,
    timeout: Timeout = None,
) -> None:
    """Print the result of a task.

    Exit status 1: the task failed. 3: it has not ended.
    """
    target, words = choose_app(context, words)
    if len(words) != 1:
        raise ConfigError(f"which task? aiotaskq result {target} ID")
    (task_id,) = words

    async def work(app: TaskQueue) -> TaskResult[Any] | str:
        handle = app.handle(task_id)
        if wait or timeout is not None:
            return await wait_for(handle, timeout)
        outcome = await app.load_outcome(task_id)
        if outcome is None or not outcome.status.final:
            status = await handle.status()
            typer.echo(f"{task_id} is {status}", err=True)
            raise typer.Exit(TIMED_OUT)
        return app.read(outcome)

    report(in_app(target, work))


def check_results(app: TaskQueue, target: str) -> None:
    """Refuse to wait where nothing will come."""
    if not app.keeps_results:
        raise ConfigError(f"{target} keeps no results: there is nothing to wait for")


async def wait_for(handle: TaskHandle[Any], timeout: float | None) -> TaskResult[Any]:
    """Wait for a task to end; exit if it does not in time."""
    try:
        return await handle.wait(timeout)
    except ResultTimeout as error:
        typer.echo(f"aiotaskq: {error}", err=True)
        raise typer.Exit(TIMED_OUT) from error


def report(ended: TaskResult[Any] | str) -> None:
    """Print an id, or a result; exit if the task failed."""
    if isinstance(ended, str):
        typer.echo(ended)
    elif ended.error is None:
        typer.echo(show(ended.return_value))
    else:
        if ended.traceback:
            typer.echo(ended.traceback.rstrip(), err=True)
        typer.echo(f"{ended.status}: {_reason(ended.error)}", err=True)
        raise typer.Exit(FAILED)


def _reason(error: ResultError) -> str:
    if isinstance(error, TaskFailed):
        return f"{error.exc_type}: {error.exc_message}"
    return str(error)


def value_of(text: str) -> Any:
    """Return an argument as it was typed: JSON, or else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def keywords_of(pairs: list[str]) -> dict[str, Any]:
    """Return keyword arguments that were typed as name=value."""
    keywords = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"{pair!r} is no keyword argument; write it as name=value")
        keywords[name] = value_of(text)
    return keywords
