"""Names, ids, reasons and errors that somebody made to deceive: in logs and in the commands."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import signal
import sqlite3
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from fractions import Fraction
from ipaddress import IPv6Address
from pathlib import Path, PurePosixPath

import msgspec
import pytest
from msgspec import Raw

from aiotaskq import Reject, Schedule, TaskQueue
from aiotaskq.cli import main
from aiotaskq.cli.output import json_data, say_json, say_value
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.settlement import Dead
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.encoding.tags import resolve
from aiotaskq.forks import STOP_SIGNALS

EVIL = "x\x1b[31m\x9b2J\n[2026-01-01: INFO] forged\r\x00\u202e[/b][bold]\\"
MEGABYTE = "m" * 2**20
TASKS = """\
from aiotaskq import TaskQueue
app = TaskQueue("tasks", broker="sqlite:///store.db")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "hostile_tasks.py").write_text(TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


async def fill(folder: Path) -> None:
    """Store hostile data, as anybody can with access to the store."""
    broker = SQLiteBroker(f"sqlite:///{folder / 'store.db'}")
    await broker.open()
    consumer = broker.consumer(["plain"], name="w", lease=60)
    await consumer.open()
    body = msgspec.json.encode({"id": "a", "task": EVIL, "args": [EVIL], "kwargs": {}})
    await broker.publish([Envelope(id=one, queue="plain", body=body) for one in ("a", "b")])
    first, second = await consumer.fetch(2, 0)
    assert not await consumer.settle([Dead(first, EVIL, b"\xff"), Dead(second, MEGABYTE, b"")])
    backend = broker.backend()
    await backend.open()
    failure = {"exc_type": EVIL, "exc_message": [EVIL], "exc_module": "builtins"}
    outcomes = [
        Outcome(
            task_id="failed",
            status=TaskStatus.FAILURE,
            result=Raw(msgspec.json.encode(failure)),
            traceback=f"Traceback (most recent call last):\n  x\nE: {EVIL}",
        ),
        Outcome(
            task_id="good",
            status=TaskStatus.SUCCESS,
            result=Raw(msgspec.json.encode(f"{EVIL}\U000e0001")),
        ),
    ]
    await backend.store(outcomes, 600)
    await consumer.close()
    await broker.close()
    await backend.close()
    with closing(sqlite3.connect(folder / "store.db")) as store:
        for queue in (EVIL, MEGABYTE):
            store.execute("INSERT INTO aiotaskq_messages SELECT * FROM aiotaskq_messages WHERE 0")
            columns = [row[1] for row in store.execute("PRAGMA table_info(aiotaskq_dead)")]
            given = ", ".join("?" if name == "queue" else name for name in columns if name != "seq")
            names = ", ".join(name for name in columns if name != "seq")
            store.execute(
                f"INSERT INTO aiotaskq_dead ({names}) SELECT {given} FROM aiotaskq_dead LIMIT 1",
                (queue,),
            )
        store.commit()


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.raises(SystemExit) as ended:
        main([*words])
    for number, handler in handlers.items():  # a worker that ends ignores further stop signals
        signal.signal(number, handler)
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def assert_harmless(text: str) -> None:
    lines = text.split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [line for line in lines if line.startswith("[2026-01-01")] == []
    assert len(text) < 60_000


def test_the_commands_print_nothing_raw(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asyncio.run(fill(folder))
    app = "hostile_tasks:app"
    for words in (
        ("queues", app),
        ("dead", "list", app),
        ("dead", "show", app, "a", "b"),
        ("schedule", "list", app),
        ("result", app, "failed"),
        ("result", app, EVIL),
        ("dead", "show", app, EVIL),
        ("dead", "discard", app, EVIL, MEGABYTE),
        ("schedule", "show", app, EVIL),
        ("schedule", "remove", app, EVIL),
        ("queues", "purge", app, EVIL),
        ("queues", EVIL),
        ("call", app, EVIL, EVIL, "--queue", EVIL),
        ("worker", EVIL),
        ("worker", app, "-Q", f"{EVIL}:x,b:1"),
        (EVIL,),
        (f"--{EVIL}",),
        (MEGABYTE,),
    ):
        _, out, err = run(capfd, *words)
        assert out + err, words
        assert_harmless(out)
        assert_harmless(err)


def test_a_queue_whose_name_is_markup_is_listed(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    async def send() -> None:
        async with TaskQueue("tasks", broker="sqlite:///store.db") as app:
            for queue in ("[/b]", "[red]x[/red]", ":smile:"):
                await app.send("t", queue=queue)

    asyncio.run(send())
    status, out, _ = run(capfd, "queues", "hostile_tasks:app")
    assert status == 0
    words = out.split()
    assert all(queue in words for queue in ("[/b]", "[red]x[/red]", ":smile:"))


def test_json_stays_exact(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asyncio.run(fill(folder))
    _, out, _ = run(capfd, "dead", "list", "hostile_tasks:app", "--json")
    assert all(char.isprintable() or char == "\n" for char in out)
    letters = {one["queue"]: one for one in json.loads(out)}
    assert letters.keys() == {"plain", EVIL, MEGABYTE}
    assert {one["reason"] for one in json.loads(out)} == {EVIL, MEGABYTE}
    assert letters["plain"]["task"] == EVIL
    _, out, _ = run(capfd, "result", "hostile_tasks:app", "good")
    assert all(char.isprintable() or char == "\n" for char in out)
    assert json.loads(out) == f"{EVIL}\U000e0001"


async def add_typed(values: Mapping[str, object]) -> None:
    """Store a schedule for each value, which is an argument of its calls."""
    async with TaskQueue("tasks", broker="sqlite:///store.db") as app:
        for name, value in values.items():
            given = Schedule(60, args=(value,), kwargs={"named": value})
            await app.schedules.add(name, "t", given)


def test_json_shows_arguments_of_all_types_as_they_are_stored(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, object] = {
        "a": PurePosixPath("/x"),
        "b": 1j,
        "c": Fraction(1, 2),
        "d": IPv6Address("::1"),
        "e": deque([1]),
        "f": {(1, 2): 3},
        "g": "\ud800",
        "h": math.inf,
        "i": ["plain", {"k": None}],
    }
    asyncio.run(add_typed(values))
    for words in (["list", "hostile_tasks:app"], ["show", "hostile_tasks:app", *values]):
        status, out, _ = run(capfd, "schedule", *words, "--json")
        assert status == 0
        listed = {one["id"]: one for one in json.loads(out)}
        assert {name: resolve(one["args"])[0] for name, one in listed.items()} == {
            name: [value] for name, value in values.items()
        }
        assert all(one["kwargs"] == {"named": one["args"][0]} for one in listed.values())
        assert listed["h"]["args"] == [{"__type__": "float", "__value__": "inf"}]
        assert listed["i"]["args"] == [["plain", {"k": None}]]


def test_json_has_a_text_for_a_value_without_a_form(capfd: pytest.CaptureFixture[str]) -> None:
    class Failing:
        def __getattribute__(self, name: str) -> object:
            raise ValueError(name)

        def __repr__(self) -> str:
            raise ValueError

    say_json([json_data(Failing()), Failing(), "\ud800"])
    shown = "<Failing that cannot be shown: ValueError>"
    assert json.loads(capfd.readouterr().out) == [shown, shown, "\ud800"]
    say_value([Failing()])
    assert "that cannot be shown" in capfd.readouterr().out


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("#%(levelname)s %(message)s"))
    root = logging.getLogger("aiotaskq")
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(level)
    root.removeHandler(handler)


async def test_a_worker_logs_nothing_raw(log: io.StringIO) -> None:
    app = TaskQueue("tasks", broker="memory://", unknown_task_ttl=0, max_payload_size=2**24)

    @app.task(name="fail")
    async def fail(text: str) -> None:
        raise ValueError(text)

    @app.task(name="plain", executor="thread")
    def plain(text: str) -> str:
        return text

    @app.task(name="reject")
    async def reject(text: str) -> None:
        raise Reject(text)

    broker = await app.broker()
    bodies = [
        msgspec.json.encode({"id": EVIL, "task": EVIL}),
        msgspec.json.encode({"id": MEGABYTE, "task": MEGABYTE}),
        EVIL.encode(),
    ]
    await broker.publish(
        [Envelope(id=f"{EVIL}{n}", queue="default", body=body) for n, body in enumerate(bodies)]
    )
    for text in (EVIL, MEGABYTE):
        for task in (fail, plain, reject):
            await task.kiq(text)
    await app.worker(burst=True).run()
    await app.close()
    lines = log.getvalue().split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    odd = [one for one in lines if one and one[0] not in "# " and not one.startswith("Traceback")]
    assert [line for line in odd if not line.endswith("exception:")] == []
    assert "forged" in log.getvalue()
    assert len(log.getvalue()) < 200_000
