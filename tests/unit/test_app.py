"""`TaskQueue`: names, options, and the messages that it sends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from msgspec.structs import replace

from aiotaskq import (
    ConfigError,
    DuplicateTask,
    Retry,
    TaskQueue,
    Unsupported,
    events,
)
from aiotaskq.client.prepare import prepare, seal
from aiotaskq.contract.broker import Traits
from aiotaskq.contract.message import Delivery, Message
from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.contract.records import WorkerInfo
from aiotaskq.contract.settlement import Done
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.encoding.codec import Codec

ROOT = Path(__file__).parents[2]


@pytest.fixture
async def app() -> AsyncIterator[TaskQueue]:
    async with TaskQueue("t", broker="memory://") as app:
        yield app


async def waiting(app: TaskQueue, queue: str = "default") -> list[tuple[Message, Delivery]]:
    """Fetch and settle the waiting messages of a queue."""
    consumer = (await app.broker()).consumer([queue], name="test", lease=60)
    await consumer.open()
    taken = await consumer.fetch(100, 0)
    await consumer.settle([Done(delivery) for delivery in taken])
    await consumer.close()
    return [(Codec(accept=["json", "msgpack", "pickle"]).decode_message(d.body), d) for d in taken]


async def only(app: TaskQueue, queue: str = "default") -> Message:
    ((message, _),) = await waiting(app, queue)
    return message


def add(x: int, y: int) -> int:
    return x + y


# --- names --------------------------------------------------------------------------------------


def test_the_default_name_is_module_and_function(app: TaskQueue) -> None:
    assert app.task(add).name == f"{__name__}.add"


def test_a_name_is_taken_once(app: TaskQueue) -> None:
    app.task(name="one")(add)
    with pytest.raises(DuplicateTask, match=r"one.*test_app.py.*name="):

        @app.task(name="one")
        def other() -> None: ...


def test_a_function_made_twice_is_two_functions(app: TaskQueue) -> None:
    def register(value: int) -> None:
        @app.task
        def same() -> int:
            return value

    register(1)
    with pytest.raises(DuplicateTask):
        register(2)


def test_a_reloaded_module_may_register_again(app: TaskQueue, tmp_path: Path) -> None:
    file = tmp_path / "reloaded.py"
    file.write_text("@app.task\ndef task(): ...")
    for _ in range(2):
        exec(compile(file.read_text(), str(file), "exec"), {"app": app, "__name__": "reloaded"})
    assert list(app.tasks) == ["reloaded.task"]


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 201, 5])
def test_a_name_that_no_driver_can_keep_is_refused(app: TaskQueue, name: Any) -> None:
    with pytest.raises(ConfigError, match="printable"):
        app.task(name=name)(add)


@pytest.mark.parametrize("wrong", [5, "", "localhost:6379", object()])
def test_a_broker_must_be_a_url_or_a_driver(wrong: Any) -> None:
    for what in ("broker", "backend"):
        with pytest.raises(ConfigError, match=f"{what} is .* must be a URL"):
            TaskQueue("x", **{what: wrong})


@pytest.mark.parametrize("queue", ["a,b", "", 5])
def test_a_queue_that_no_worker_could_be_given_is_refused(app: TaskQueue, queue: Any) -> None:
    with pytest.raises(ConfigError, match="queue is"):
        app.task(queue=queue)(add)


@pytest.mark.parametrize("queues", ["default", []])
def test_a_worker_wants_a_list_of_queues(app: TaskQueue, queues: Any) -> None:
    with pytest.raises(ConfigError, match="queues is"):
        app.worker(queues=queues)


def test_a_child_forked_while_a_thread_is_in_the_app_can_use_it(tmp_path: Path) -> None:
    app = TaskQueue("x", broker=f"sqlite:///{tmp_path}/x.db")
    with app._lock:
        pid = os.fork()
        if pid == 0:
            app.drivers()  # it would wait for ever for the lock of a thread of its parent
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


PROGRAM = """
from aiotaskq import TaskQueue
app = TaskQueue("theapp", broker="memory://")

@app.task
def add(x, y): ...

if __name__ == "__main__":
    print(*app.tasks)
"""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["program.py"], "program.add"),
        (["./package/jobs.py"], "jobs.add"),
        (["-m", "package.jobs"], "package.jobs.add"),
        (["-m", "package"], "package.__main__.add"),
        (["-c", PROGRAM], "theapp.add"),
    ],
    ids=["file", "file in a folder", "-m module", "-m package", "-c"],
)
def test_a_task_of_the_main_module_is_named_as_a_worker_will_import_it(
    tmp_path: Path, arguments: list[str], name: str
) -> None:
    (tmp_path / "package").mkdir()
    for file in ("program.py", "package/__init__.py", "package/jobs.py", "package/__main__.py"):
        (tmp_path / file).write_text(PROGRAM)
    printed = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.split() == [name]


def test_a_task_keeps_its_name_in_processes_that_the_program_starts(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        textwrap.dedent(
            """
            import multiprocessing
            from aiotaskq import TaskQueue
            app = TaskQueue("theapp", broker="memory://")

            @app.task
            def add(x, y): ...

            def show():
                print(*app.tasks, flush=True)

            if __name__ == "__main__":
                process = multiprocessing.get_context("spawn").Process(target=show)
                process.start()
                process.join()
            """
        )
    )
    printed = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.split() == ["program.add"]


# --- the decorator ------------------------------------------------------------------------------


def test_options_count_however_the_decorator_is_called(app: TaskQueue) -> None:
    assert app.task(add, name="a", queue="q").options.queue == "q"  # type: ignore[call-overload]  # types do not offer it
    assert app.task(name="b", queue="q")(add).options.queue == "q"
    assert app.task()(add).options.queue is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"queu": "x"}, "queu, did you mean queue"),
        ({"bind": "yes"}, "bind"),
        ({"queue": ""}, "queue"),
        ({"priority": 10}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"retry": 3}, "retry"),
        ({"executor": "fiber"}, "executor"),
    ],
)
def test_a_wrong_option_of_a_task_is_refused(
    app: TaskQueue, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        app.task(**options)(add)


@pytest.mark.parametrize("wrong", ["reports", 5, None])
def test_only_functions_become_tasks(app: TaskQueue, wrong: Any) -> None:
    with pytest.raises(ConfigError, match="no function"):
        app.task(wrong)


# --- messages -----------------------------------------------------------------------------------


async def test_the_queue_is_the_calls_then_the_tasks_then_the_routes_then_the_default(
    app: TaskQueue,
) -> None:
    app.conf.task_routes = {"routed.*": "routes", "own.*": "routes"}
    app.conf.task_default_queue = "standard"
    app.task(name="own.task", queue="own")(add)
    app.task(name="routed.task")(add)
    app.task(name="plain.task")(add)
    for name, options, queue in [
        ("own.task", {"queue": "call"}, "call"),
        ("own.task", {}, "own"),
        ("routed.task", {}, "routes"),
        ("routed.unknown", {}, "routes"),
        ("plain.task", {}, "standard"),
        ("unknown", {"queue": None}, "standard"),
    ]:
        await app.send(name, (1, 2), **options)  # type: ignore[arg-type]  # a part of CallOptions
        assert (await only(app, queue)).queue == queue


async def test_the_priority_is_the_calls_then_the_tasks_then_the_default(app: TaskQueue) -> None:
    app.conf.task_default_priority = 2
    task = app.task(name="t", priority=5)(add)
    await task.kiq(1, 2)
    await task.with_options(priority=0).kiq(1, 2)
    await app.send("other")
    assert [message.priority for message, _ in await waiting(app)] == [5, 2, 0]


async def test_options_travel_in_the_message(app: TaskQueue) -> None:
    before = time.time()
    handle = await app.send(
        "x",
        (1,),
        {"k": 2},
        task_id="mine",
        timeout=7,
        soft_timeout=6,
        retry=Retry(max_attempts=4, delay=3),
        headers={"a": "b"},
        expires=60,
    )
    message = await only(app)
    assert handle.id == message.id == "mine"
    assert (message.timeout, message.soft_timeout) == (7, 6)
    assert message.retry == Retry(max_attempts=4, delay=3).to_policy()
    assert message.headers == {"a": "b"}
    assert message.expires_at is not None
    assert before + 60 <= message.expires_at <= time.time() + 60
    assert before <= message.sent_at <= time.time()
    assert (bytes(message.args), bytes(message.kwargs)) == (b"[1]", b'{"k":2}')


AT = datetime(2030, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    "when",
    [
        AT,
        AT.astimezone(timezone(timedelta(hours=-5))),
        AT.astimezone(ZoneInfo("Europe/Oslo")).replace(tzinfo=None),
    ],
    ids=["UTC", "another zone", "naive: in the zone of the application"],
)
async def test_a_time_means_the_same_moment_in_every_form(app: TaskQueue, when: datetime) -> None:
    app.conf.timezone = "Europe/Oslo"
    task = app.task(add)
    call = task.with_options(eta=when, expires=when).s(1, 2)
    outgoing = prepare(call, app)
    assert outgoing.message.expires_at == AT.timestamp()
    assert seal(outgoing, app.codec).not_before == AT.timestamp()


@pytest.mark.parametrize("expires", [60, timedelta(minutes=1)])
def test_seconds_are_counted_by_the_store(app: TaskQueue, expires: float | timedelta) -> None:
    task = app.task(add)
    outgoing = prepare(task.with_options(countdown=5, expires=expires).s(1, 2), app)
    envelope = seal(outgoing, app.codec)
    assert (envelope.delay, envelope.not_before) == (5, None)
    assert (envelope.expires_in, envelope.expires_at) == (60, None)
    assert outgoing.message.expires_at is not None  # for readers of the message
    at_once = seal(prepare(task.with_options(countdown=-1).s(1, 2), app), app.codec)
    assert (at_once.delay, at_once.not_before) == (None, None)


def test_an_expiry_that_a_middleware_changed_goes_before_the_calls(app: TaskQueue) -> None:
    task = app.task(add)
    outgoing = prepare(task.with_options(expires=60).s(1, 2), app)
    same = seal(outgoing.with_message(replace(outgoing.message, headers={"a": "b"})), app.codec)
    assert (same.expires_in, same.expires_at) == (60, None)
    moved = seal(outgoing.with_message(replace(outgoing.message, expires_at=7.0)), app.codec)
    assert (moved.expires_in, moved.expires_at) == (None, 7.0)


async def test_a_delayed_task_waits_in_the_store(app: TaskQueue) -> None:
    await app.send("x", countdown=3600)
    await app.send("x", eta=datetime.now(UTC) + timedelta(hours=1))
    depth = (await (await app.broker()).depth())["default"]
    assert (depth.delayed, depth.ready) == (2, 0)


async def test_ids_are_new_and_sort_by_time(app: TaskQueue) -> None:
    ids = [(await app.send("x")).id for _ in range(50)]
    assert len(set(ids)) == 50
    assert all(UUID(one).version == 7 for one in ids)
    stamps = [one[:13] for one in ids]
    assert stamps == sorted(stamps)


async def test_an_id_of_ones_own_is_stored_once_and_heard_of_once(app: TaskQueue) -> None:
    sent: list[events.Sent] = []
    app.on(events.Sent)(sent.append)
    for _ in range(3):
        assert (await app.send("x", task_id="mine")).id == "mine"
    assert len(await waiting(app)) == 1
    assert [event.message.id for event in sent] == ["mine"]


async def test_a_uuid_may_be_an_id(app: TaskQueue) -> None:
    handle = await app.send("x", task_id=UUID(int=5))  # type: ignore[arg-type]  # str() is what counts
    assert handle.id == str(UUID(int=5))
    assert (await only(app)).id == handle.id


async def test_options_that_the_broker_lacks_are_refused_at_the_call() -> None:
    class Poor(MemoryBroker):
        traits: ClassVar[Traits] = Traits(priorities=False, unique=False)

    async with TaskQueue("t", broker=Poor()) as app:
        await app.send("x")
        with pytest.raises(Unsupported, match="priorities"):
            await app.send("x", priority=5)
        assert len(await waiting(app)) == 1


async def test_an_id_of_ones_own_is_an_id_where_it_cannot_be_unique() -> None:
    class Poor(MemoryBroker):
        traits: ClassVar[Traits] = Traits(unique=False)

    async with TaskQueue("t", broker=Poor()) as app:
        for _ in range(2):
            await app.send("x", task_id="mine")
        stored = await waiting(app)
        assert [(message.id, one.id) for message, one in stored] == [("mine", "mine")] * 2


# --- workers and cancelling ---------------------------------------------------------------------


async def test_the_workers_that_are_alive_tell_of_themselves(app: TaskQueue) -> None:
    assert await app.workers() == []
    told = WorkerInfo(name="w", host="h", pid=1, started_at=2.0, tasks=("a", "b"))
    broker = await app.broker()
    consumers = [
        broker.consumer(["default"], name="one", lease=60, about=msgspec.json.encode(told)),
        broker.consumer(["default"], name="two", lease=60, about=b"no worker of this package"),
        broker.consumer(["default"], name="three", lease=60),
    ]
    for consumer in consumers:
        await consumer.open()
    assert await app.workers() == [told]
    for consumer in consumers:
        await consumer.close()
    assert await app.workers() == []


async def test_revoking_may_spare_a_running_task(app: TaskQueue) -> None:
    consumer = (await app.broker()).consumer(["default"], name="w", lease=60)
    await consumer.open()
    held = await app.send("x")
    (delivery,) = await consumer.fetch(1, 1)
    waits, delayed = await app.send("x"), await app.send("x", countdown=3600)
    for handle in (held, waits, delayed):
        await app.cancel(handle.id, running=False)
    assert [await handle.status() for handle in (held, waits, delayed)] == [
        TaskStatus.PENDING,
        TaskStatus.REVOKED,
        TaskStatus.REVOKED,
    ]
    assert list(await consumer.fetch(10, 0)) == []
    assert list((await consumer.news()).cancelled) == []
    await app.cancel(held.id)
    assert await held.status() is TaskStatus.REVOKED
    assert list((await consumer.news()).cancelled) == [held.id]
    await consumer.settle([Done(delivery)])
    await consumer.close()
