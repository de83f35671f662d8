"""`WorkerEnvironment`: the objects that all parts of a worker share."""

from __future__ import annotations

from dataclasses import dataclass

from aiotaskq.context import State
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.records import WorkerInfo
from aiotaskq.contract.results import ResultBackend
from aiotaskq.tasks.application import Application
from aiotaskq.worker.health import Health
from aiotaskq.worker.pools import Pools
from aiotaskq.worker.worker_options import WorkerOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnvironment:
    """Made once the drivers are open and the lifespans have begun; it lasts as long as the worker.

    Attributes:
        app: The application whose tasks are run.
        options: The options of the worker.
        broker: Open.
        backend: Open; None: no results are kept.
        pools: For plain functions.
        health: Where problems are noted.
        state: The objects that the lifespans have set up for the tasks.
        info: The description of the worker for others.
    """

    app: Application
    options: WorkerOptions
    broker: Broker
    backend: ResultBackend | None
    pools: Pools
    health: Health
    state: State
    info: WorkerInfo
