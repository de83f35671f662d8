"""Schedules of a broker that stores none: they rest elsewhere, and a relay passes their runs on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

import aiotaskq.drivers.sqlite  # noqa: F401 - an import in the loop of a test would block it
from aiotaskq import BrokerUnavailable, ConfigError, TaskQueue, TaskRevoked, every
from aiotaskq.client.schedule_store import create_schedule_broker
from aiotaskq.config import Config
from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.events import Succeeded
from tests.servers import RabbitServer
from tests.worker.events import LONG, EventRecorder, until

pytestmark = pytest.mark.timeout(120)


class Bare(MemoryBroker):
    """A broker without schedules and unique ids, as RabbitMQ is."""

    traits: ClassVar[Traits] = msgspec.structs.replace(
        MemoryBroker.traits, schedules=False, unique=False
    )


class Gone(Bare):
    """A broker that cannot be reached for as long as a test says."""

    away: ClassVar[bool] = False

    async def publish(
        self, batch: Sequence[Envelope], *, call_id: str | None = None
    ) -> Collection[str]:
        if Gone.away:
            raise BrokerUnavailable("it is away")
        return await super().publish(batch, call_id=call_id)


class Locked(Bare):
    """A broker that cannot be opened for as long as a test says."""

    error: ClassVar[Exception | None] = None

    async def open(self) -> None:
        if Locked.error is not None:
            raise Locked.error
        await super().open()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, where the embedded default makes its file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "url"),
    [
        (None, "sqlite:///aiotaskq.db"),
        ("rpc://", "sqlite:///aiotaskq.db"),
        ("disabled://", "sqlite:///aiotaskq.db"),
        ("memory://", "sqlite:///aiotaskq.db"),
        ("amqp://h", "sqlite:///aiotaskq.db"),
        ("redis://h/1", "redis://h/1"),
        ("sqlite:///there.db", "sqlite:///there.db"),
        ("db+postgresql+psycopg2://u@h/d", "postgresql://u@h/d"),
    ],
)
def test_a_broker_without_schedules_has_them_where_the_results_are(
    results: str | None, url: str
) -> None:
    found = create_schedule_broker(Config(), Bare(), results)
    assert found is not None
    assert found.url == url


def test_a_broker_with_schedules_stores_them_itself() -> None:
    assert create_schedule_broker(Config(), MemoryBroker(), "redis://h") is None


def test_the_setting_comes_first() -> None:
    conf = Config()
    conf.schedule_store = "sqlite:///mine.db"
    for broker in (MemoryBroker(), Bare()):
        found = create_schedule_broker(conf, broker, "redis://h")
        assert found is not None
        assert found.url == "sqlite:///mine.db"


def test_a_store_without_schedules_is_refused_as_the_setting() -> None:
    conf = Config()
    conf.schedule_store = "amqp://h"
    with pytest.raises(ConfigError, match=r"schedule_store is amqp://.*redis://, postgresql://"):
        create_schedule_broker(conf, Bare(), None)


# --- the runs -----------------------------------------------------------------------------------


async def test_the_runs_reach_the_broker_once_under_their_fixed_ids() -> None:
    app = TaskQueue("app", broker=Bare(), schedule_store="sqlite:///mine.db")
    ended = EventRecorder(app, Succeeded)

    @app.task(schedule=every(0.2))
    async def tick() -> None: ...

    async with app, app.worker(), app.scheduler(), app.scheduler():
        await ended.count(3)
        (info,) = await app.schedules.list()
        assert info.id == tick.name
    ids = [event.message.id for event in ended.events]
    assert len(set(ids)) == len(ids)
    assert all(one.startswith(f"{tick.name}@") for one in ids)


async def test_runs_wait_in_the_store_while_the_broker_is_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = Gone()
    app = TaskQueue("app", broker=broker, schedule_store="sqlite:///mine.db")
    ended = EventRecorder(app, Succeeded)

    @app.task(schedule=every(0.2))
    async def tick() -> None: ...

    Gone.away = True
    try:
        async with app, app.worker():
            async with app.scheduler():
                await until(lambda: "runs wait to be passed on" in caplog.text)
            # That scheduler is gone; another one passes its runs on.
            (info,) = await app.schedules.list()
            assert info.last_at is not None
            Gone.away = False
            async with app.scheduler():
                await ended.count(2)
    finally:
        Gone.away = False
    first = min(event.message.id for event in ended.events)
    assert first <= f"{tick.name}@{info.last_at:%Y-%m-%dT%H:%M:%S}.9Z"


@pytest.mark.parametrize("error", [ConfigError("wrong password"), RuntimeError("a fault")])
async def test_runs_are_passed_on_when_a_broker_that_refused_is_mended(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    app = TaskQueue(
        "app", broker=Locked(), schedule_store="sqlite:///mine.db", broker_publish_timeout=0.05
    )
    ended = EventRecorder(app, Succeeded)

    @app.task(schedule=every(0.2))
    async def tick() -> None: ...

    monkeypatch.setattr(Locked, "error", BrokerUnavailable("it is away"))
    told = "runs wait to be passed on to the broker, trying again: "
    async with app.scheduler():
        await until(lambda: f"{told}it is away" in caplog.text)
        monkeypatch.setattr(Locked, "error", error)
        await until(lambda: f"{told}{error}" in caplog.text)
        monkeypatch.setattr(Locked, "error", None)
        async with app.worker():
            await ended.count(1)
    await app.close()


@pytest.mark.server
async def test_rabbitmq_serves_schedules(rabbit_server: RabbitServer) -> None:
    rabbit_server.start()
    app = TaskQueue("app", broker=rabbit_server.url(), backend="rpc://", prefix="scheduled")
    ended = EventRecorder(app, Succeeded)

    @app.task
    async def tick(n: int) -> int:
        return n

    app.conf.beat_schedule = {"often": {"task": tick.name, "schedule": 0.3, "args": (7,)}}
    async with app, app.worker(), app.scheduler():
        await ended.count(2)
    assert [event.value for event in ended.events[:2]] == [7, 7]
    assert ended.events[0].message.id.startswith("often@")


@pytest.mark.server
async def test_rabbitmq_takes_an_id_of_ones_own(rabbit_server: RabbitServer) -> None:
    rabbit_server.start()
    app = TaskQueue("app", broker=rabbit_server.url(), backend="rpc://", prefix="named")

    @app.task
    async def job() -> str:
        return "done"

    async with app, app.worker():
        handle = await job.with_options(task_id="mine").kiq()
        assert handle.id == "mine"
        assert await handle.result(LONG) == "done"
        await app.handle("other").cancel()
        with pytest.raises(TaskRevoked):
            await (await job.with_options(task_id="other").kiq()).result(LONG)
