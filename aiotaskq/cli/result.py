"""`aiotaskq result`: the result of one task."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aiotaskq.app import TaskQueue
from aiotaskq.cli.common import choose_app, print_error, run_with_app
from aiotaskq.cli.exit_status import NO_RESULT, TASK_FAILED
from aiotaskq.cli.output import say, say_traceback, say_value
from aiotaskq.errors import ConfigError, ResultError, ResultTimeout, TaskFailed
from aiotaskq.tasks.handle import TaskHandle
from aiotaskq.tasks.result import TaskResult

# Also options of the other commands that can wait for a result.
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Wait for the result and print it.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Seconds to wait; implies --wait.")
]


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
            say(f"{task_id} is {status}", err=True)
            raise typer.Exit(NO_RESULT)
        return app.read(outcome)

    print_result(run_with_app(target, work))


def check_keeps_results(app: TaskQueue, target: str) -> None:
    """Refuse to wait for a result where none is kept."""
    if not app.keeps_results:
        raise ConfigError(f"{target} keeps no results: there is nothing to wait for")


async def wait_for(handle: TaskHandle[Any], timeout: float | None) -> TaskResult[Any]:
    """Wait for a task to end; exit if it does not in time."""
    try:
        return await handle.wait(timeout)
    except ResultTimeout as error:
        print_error(str(error))
        raise typer.Exit(NO_RESULT) from error


def print_result(ended: TaskResult[Any] | str) -> None:
    """Print the id of a task, or its result; exit if the task failed."""
    if isinstance(ended, str):
        say(ended)
    elif ended.error is None:
        say_value(ended.return_value)
    else:
        if ended.traceback:
            say_traceback(ended.traceback)
        say(f"{ended.status}: {_reason(ended.error)}", err=True)
        raise typer.Exit(TASK_FAILED)


def _reason(error: ResultError) -> str:
    if isinstance(error, TaskFailed):
        return f"{error.exc_type}: {error.exc_message}"
    return str(error)
