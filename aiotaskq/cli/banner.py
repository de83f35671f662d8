"""The first lines that a worker or a scheduler prints, in the words that Celery users look for."""

from __future__ import annotations

from aiotaskq.app import TaskQueue
from aiotaskq.ids import host_name, version
from aiotaskq.worker.worker_options import WorkerOptions


def banner(app: TaskQueue, target: str, options: WorkerOptions, processes: int) -> list[str]:
    """Return the lines of a worker's banner: connections without passwords, queues, tasks."""
    broker, backend = app.drivers()
    return [
        f"aiotaskq {version()} on {options.name}",
        "",
        f".> app:         {app.name} ({target})",
        f".> transport:   {broker.url}",
        f".> results:     {'disabled' if backend is None else backend.url}",
        (
            f".> concurrency: {options.concurrency} tasks at once, {options.threads} threads,"
            f" {processes} {'process' if processes == 1 else 'processes'}"
        ),
        "",
        "[queues]",
        *(_queue_line(queue, options) for queue in options.queues),
        "",
        "[tasks]",
        *(_task_line(app, name, options) for name in sorted(app.tasks)),
        *([] if app.tasks else ["  (none: does the module import those that define them?)"]),
        "",
    ]


def scheduler_banner(app: TaskQueue, target: str) -> list[str]:
    """Return the lines of a scheduler's banner: its connection, and the schedules of the code."""
    broker, _ = app.drivers()
    store = app.schedule_broker()
    declared = sorted(app.declared_schedules().items())
    zone = app.conf.timezone
    return [
        f"aiotaskq {version()} scheduler on {host_name()}",
        "",
        f".> app:         {app.name} ({target})",
        f".> transport:   {broker.url}",
        *([] if store is None else [f".> schedules:   {store.url}"]),
        "",
        "[schedules of the code]",
        *(
            f"  . {name}: {entry.schedule.timing(zone).describe()}, {entry.task}"
            for name, entry in declared
        ),
        *([] if declared else ["  (none; those made at run time are in the store)"]),
        "",
    ]


def _queue_line(queue: str, options: WorkerOptions) -> str:
    weights = options.weights
    share = f"  (weight {weights[queue]} of {sum(weights.values())})" if weights else ""
    return f"  . {queue}{share}"


def _task_line(app: TaskQueue, name: str, options: WorkerOptions) -> str:
    queue = app.effective_options(name).queue
    served = "" if queue in options.queues else f"  (goes to {queue}, which is not served here)"
    return f"  . {name}{served}"
