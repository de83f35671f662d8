"""`app.dead`: selecting, describing, retrying and deleting dead letters."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiotaskq import ConfigError, TaskQueue, TaskStatus
from aiotaskq.client.dead_letters import DeadTask
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Attempt, Delivery, Envelope, Message
from aiotaskq.contract.outcome import Outcome
from aiotaskq.contract.records import DeathDetails, Depth
from aiotaskq.contract.settlement import Dead, Done
from aiotaskq.encoding.codec import Codec
from aiotaskq.encoding.exceptions import encode_error
from aiotaskq.errors import BatchRefused, BrokerUnavailable

CODEC = Codec(accept=("json", "msgpack", "pickle"))


@pytest.fixture(params=["memory", "sqlite"])
async def app(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TaskQueue]:
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'queue.db'}"
    async with TaskQueue("t", broker=url) as app:
        yield app


def attempt(number: int, error: str = "ValueError: no") -> Attempt:
    return Attempt(number=number, at=1000.0 + number, worker="w", error=error, traceback="tb")


async def bury(
    app: TaskQueue,
    task_id: str,
    *,
    task: str = "t.add",
    queue: str = "default",
    reason: str = "it was rejected",
    body: bytes | None = None,
    details: bytes | None = None,
    codec: Codec = CODEC,
    args: tuple[Any, ...] = (),
    **fields: Any,
) -> None:
    """Add a dead letter as a worker does."""
    broker = await app.broker()
    if body is None:
        packed, named, pickled = codec.pack(args, {"who": "ada"} if args else {})
        message = Message(
            id=task_id, task=task, args=packed, kwargs=named, pickled=pickled, queue=queue, **fields
        )
        body = codec.encode_message(message)
    if details is None:
        died = DeathDetails(task=task, worker="w", attempts=fields.get("history", ()))
        details = msgspec.json.encode(died)
    consumer = broker.consumer([queue], name="test", lease=60)
    await consumer.open()
    await broker.publish([Envelope(id=task_id, queue=queue, body=body)])
    (delivery,) = await consumer.fetch(10, 0)
    await consumer.settle([Dead(delivery, reason, details)])
    await consumer.close()


async def taken(broker: Broker, queue: str = "default") -> list[Delivery]:
    """Fetch and settle all waiting messages of a queue."""
    consumer = broker.consumer([queue], name="test", lease=60)
    await consumer.open()
    got = list(await consumer.fetch(100, 0))
    await consumer.settle([Done(delivery) for delivery in got])
    await consumer.close()
    return got


async def store(app: TaskQueue, task_id: str, status: TaskStatus) -> None:
    backend = await app.backend()
    assert backend is not None
    error = encode_error("ValueError", "no")
    await backend.store([Outcome(task_id=task_id, status=status, result=error)], None)


def ids(letters: Any) -> list[str]:
    return [one.id for one in letters]


# --- selecting ----------------------------------------------------------------------------------


@pytest.fixture
async def several(app: TaskQueue) -> TaskQueue:
    await bury(app, "a", reason="failed 3 times, the last time with ValueError: no")
    await bury(app, "b", task="billing.pay")
    await bury(app, "c", task="billing.refund", reason="2 workers died while running it")
    await bury(app, "d", queue="other", reason="no worker has had a task 't.add'")
    return app


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ({}, "cbad"),  # one queue after the other, the newest first
        ({"queue": "default"}, "cba"),
        ({"queue": "nowhere"}, ""),
        ({"id": "b"}, "b"),
        ({"id": ["d", "a", "x"]}, "ad"),
        ({"task": "billing.pay"}, "b"),
        ({"task": "billing.*"}, "cb"),
        ({"task": "billing"}, ""),
        ({"reason": "WORKER"}, "cd"),
        ({"reason": "worker", "queue": "other"}, "d"),
        ({"reason": "[x]"}, ""),
        ({"task": "t.add", "reason": "valueerror"}, "a"),
        ({"task": None, "reason": None, "id": None, "queue": None}, "cbad"),
    ],
    ids=str,
)
async def test_all_criteria_must_match(
    several: TaskQueue, which: dict[str, Any], expected: str
) -> None:
    assert ids(await several.dead.list(**which)) == list(expected)
    assert await several.dead.count(**which) == len(expected)


async def test_a_key_names_one_letter_of_an_id(app: TaskQueue) -> None:
    await bury(app, "a", reason="first")
    await bury(app, "a", reason="second")
    newer, older = await app.dead.list(id="a")
    assert (newer.reason, older.reason) == ("second", "first")
    assert await app.dead.discard(key=older.key, queue="default") == 1
    assert [one.key for one in await app.dead.list()] == [newer.key]


async def test_the_limit_counts_matching_letters(several: TaskQueue) -> None:
    assert ids(await several.dead.list(limit=2)) == ["c", "b"]
    assert ids(await several.dead.list(limit=1, id="d")) == ["d"]
    assert ids(await several.dead.list(limit=None)) == ["c", "b", "a", "d"]
    assert await several.dead.discard(limit=1, task="billing.*") == 1
    assert ids(await several.dead.list()) == ["b", "a", "d"]


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_must_be_at_least_1(app: TaskQueue, limit: int) -> None:
    with pytest.raises(ConfigError, match=r"limit is .*1 or more"):
        await app.dead.list(limit=limit)


@pytest.mark.parametrize("verb", ["retry", "discard"])
async def test_changes_need_a_criterion(several: TaskQueue, verb: str) -> None:
    change = getattr(several.dead, verb)
    with pytest.raises(ConfigError, match=r"id=, key=, task=, reason= or queue=, or everything"):
        await change()
    with pytest.raises(ConfigError, match="everything=True"):
        await change(id=None, queue=None)
    with pytest.raises(ConfigError, match=r"id= names none"):
        await change(id=[])
    with pytest.raises(ConfigError, match="leave the other words out"):
        await change(everything=True, queue="default")
    assert await several.dead.count() == 4
    assert await change(everything=True) == 4
    assert await several.dead.count() == 0


@pytest.mark.parametrize("verb", ["list", "count", "retry", "discard"])
async def test_a_word_that_is_misspelled_is_refused(several: TaskQueue, verb: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no taks= .*; there are queue=, id=, key="):
        await getattr(several.dead, verb)(queue="default", taks="billing.pay")
    assert await several.dead.count() == 4


async def test_the_name_of_a_task_may_look_like_a_pattern(app: TaskQueue) -> None:
    await bury(app, "a", task="t.[x]")
    await bury(app, "b", task="t.x")
    assert ids(await app.dead.list(task="t.[x]")) == ["b", "a"]
    assert ids(await app.dead.list(task="t.x")) == ["b"]


async def test_any_number_is_read_page_by_page(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.dead_letters._PAGE", 3)
    names = [f"{number:02}" for number in range(10)]
    for name in names:
        await bury(app, name, task="odd" if int(name) % 2 else "even")
    assert ids(await app.dead.list()) == names[::-1]
    assert ids(await app.dead.list(limit=2, task="even")) == ["08", "06"]
    assert await app.dead.discard(task="odd") == 5
    assert await app.dead.retry(everything=True) == 5
    assert await (await app.broker()).depth() == {"default": Depth(ready=5)}


# --- describing ---------------------------------------------------------------------------------


async def test_the_facts_of_a_dead_task(app: TaskQueue) -> None:
    before = datetime.now(UTC)
    history = (attempt(1), attempt(2, "OSError: away"))
    await bury(app, "a", args=(2, "ü"), history=history, reason="failed 2 times")
    (one,) = await app.dead.list()
    assert isinstance(one, DeadTask)
    assert (one.id, one.task, one.queue, one.worker) == ("a", "t.add", "default", "w")
    assert (one.reason, one.crashes, one.crash_note) == ("failed 2 times", 0, "")
    assert abs(one.died_at - before).total_seconds() < 60
    assert one.died_at.tzinfo is UTC
    assert one.attempts == history
    assert (one.args, one.kwargs) == ('[2,"ü"]', '{"who":"ada"}')
    assert CODEC.decode_message(one.payload).id == "a"


@pytest.mark.parametrize(
    ("serializer", "args", "shown"),
    [
        ("json", (), ("[]", "{}")),
        ("msgpack", (), ("[]", "{}")),
        ("msgpack", (1, "x"), ('[1,"x"]', '{"who":"ada"}')),
        ("msgpack", ({(1, 2): 3},), ("[{(1, 2): 3}]", '{"who":"ada"}')),
        ("pickle", (1,), (f"pickled, {len(pickle.dumps(((1,), {'who': 'ada'})))} bytes", "")),
    ],
    ids=str,
)
async def test_arguments_are_shown_as_far_as_they_can_be_read(
    app: TaskQueue, serializer: Any, args: tuple[Any, ...], shown: tuple[str, str]
) -> None:
    codec = Codec(task_serializer=serializer, accept=(serializer,))
    await bury(app, "a", args=args, codec=codec)
    (one,) = await app.dead.list()
    assert (one.task, one.args, one.kwargs) == ("t.add", *shown)


@pytest.mark.parametrize("details", [b"", b"\xff", b"[]", b'{"task":7}'])
async def test_without_details_the_facts_are_read_from_the_message(
    app: TaskQueue, details: bytes
) -> None:
    await bury(app, "a", details=details, history=(attempt(1),))
    await bury(app, "", body=b"\xff\x00", details=details)
    unread, one = await app.dead.list()
    assert (one.id, one.task, one.attempts, one.worker) == ("a", "t.add", (attempt(1),), "")
    assert (unread.id, unread.task, unread.args, unread.kwargs) == ("", "", "", "")
    assert unread.payload == b"\xff\x00"
    assert ids(await app.dead.list(task="t.*")) == ["a"]


# --- retrying -----------------------------------------------------------------------------------


async def test_a_retry_runs_under_the_same_id_from_the_first_attempt_on(app: TaskQueue) -> None:
    seen: list[int] = []

    @app.task(name="t.add")
    async def add(x: int, who: str) -> int:
        seen.append(x)
        return x + 1

    await bury(app, "a", args=(2,), history=(attempt(1), attempt(2)), attempt=3, unknown_for=99.0)
    await store(app, "a", TaskStatus.FAILURE)
    waiter = app.handle("a")
    assert await waiter.status() is TaskStatus.FAILURE
    assert await app.dead.retry(id="a") == 1
    assert await waiter.status() is TaskStatus.PENDING
    async with app.worker():
        ended = await waiter.wait(timeout=120)
    assert (ended.return_value, ended.attempts, seen) == (3, 1, [2])
    assert await app.dead.list() == []


@pytest.mark.parametrize("serializer", ["json", "msgpack", "pickle"])
async def test_a_retried_message_keeps_all_but_its_failures(
    app: TaskQueue, serializer: Any
) -> None:
    codec = Codec(task_serializer=serializer, accept=(serializer,))
    expires = time.time() + 1000
    await bury(
        app,
        "a",
        args=(1,),
        codec=codec,
        history=(attempt(1),),
        attempt=2,
        unknown_for=9.0,
        priority=7,
        timeout=5.0,
        headers={"tenant": "x"},
        expires_at=expires,
    )
    (before,) = await app.dead.list()
    await app.dead.retry(everything=True)
    (delivery,) = await taken(await app.broker())
    message = codec.decode_message(delivery.body)
    was = codec.decode_message(before.payload)
    assert (message.attempt, message.unknown_for) == (1, 0.0)
    assert message == msgspec.structs.replace(was, attempt=1, unknown_for=0.0)
    assert message.history == (attempt(1),)
    assert (delivery.id, delivery.priority, delivery.crashes) == ("a", 7, 0)
    assert not delivery.expired


async def test_a_dead_task_has_the_history_of_its_details(app: TaskQueue) -> None:
    full = (attempt(1), attempt(2))  # the message itself has no record of its last attempt
    details = msgspec.json.encode(DeathDetails(task="t.add", attempts=full))
    await bury(app, "a", history=full[:1], attempt=2, details=details)
    assert await app.dead.retry(task="t.add") == 1
    (delivery,) = await taken(await app.broker())
    assert CODEC.decode_message(delivery.body).history == full


async def test_a_retried_message_has_no_expiry(app: TaskQueue) -> None:
    await bury(app, "a", expires_at=time.time() - 1)
    await app.dead.retry(id="a")
    (delivery,) = await taken(await app.broker())
    assert not delivery.expired
    assert CODEC.decode_message(delivery.body).expires_at is None


async def test_an_unreadable_message_is_retried_unchanged(app: TaskQueue) -> None:
    every = bytes(range(256))
    await bury(app, "a", body=every, details=b"")
    await bury(app, "", body=b"", details=b"")  # without an id, too
    assert await app.dead.retry(queue="default") == 2
    bodies = [delivery.body for delivery in await taken(await app.broker())]
    assert bodies == [every, b""]


async def test_a_retry_without_results_forgets_none(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    async with TaskQueue("t", broker=url, backend="disabled://") as app:
        await bury(app, "a")
        assert await app.dead.retry(id="a") == 1
        assert ids(await taken(await app.broker())) == ["a"]


async def test_a_success_is_not_forgotten(app: TaskQueue) -> None:
    await bury(app, "a")
    await store(app, "a", TaskStatus.SUCCESS)
    assert await app.dead.retry(id="a") == 1
    assert await app.handle("a").status() is TaskStatus.SUCCESS


async def test_when_the_broker_fails_in_between_the_letter_is_still_there(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bury(app, "a")
    await store(app, "a", TaskStatus.FAILURE)
    broker = await app.broker()

    async def fail(*_: Any) -> Any:
        raise BrokerUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(broker, "revive", fail)
        with pytest.raises(BrokerUnavailable):
            await app.dead.retry(id="a")
    assert await app.handle("a").status() is TaskStatus.PENDING
    assert await app.dead.retry(id="a") == 1
    assert ids(await taken(broker)) == ["a"]


async def test_a_letter_that_can_never_go_back_stays_and_the_others_go(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.dead_letters._PAGE", 2)
    for name in "abcde":
        await bury(app, name)
    broker = await app.broker()
    revive = broker.revive

    async def picky(queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        refused: dict[int, Exception] = {
            at: ValueError(f"never {one.id}")
            for at, (_, one) in enumerate(letters)
            if one.id in "bd"
        }
        answer = await revive(queue, [one for at, one in enumerate(letters) if at not in refused])
        if refused:
            raise BatchRefused(refused, answer=answer)
        return answer

    monkeypatch.setattr(broker, "revive", picky)
    with pytest.raises(BatchRefused) as info:
        await app.dead.retry(everything=True)
    # By position, the newest first.
    assert {at: str(why) for at, why in info.value.errors.items()} == {1: "never d", 3: "never b"}
    assert info.value.answer == 3
    assert sorted(ids(await taken(broker))) == ["a", "c", "e"]
    assert [one.id for one in await app.dead.list()] == ["d", "b"]


async def test_several_at_once_retry_each_letter_once(
    app: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiotaskq.client.dead_letters._PAGE", 4)
    names = {f"{number:02}" for number in range(30)}
    for name in sorted(names):
        await bury(app, name)
    counts = await asyncio.gather(
        app.dead.retry(everything=True),
        app.dead.retry(queue="default"),
        app.dead.discard(reason="rejected"),
    )
    assert sum(counts) == 30
    back = ids(await taken(await app.broker()))
    assert len(back) == len(set(back)) == counts[0] + counts[1]
    assert await app.dead.count() == 0


async def test_the_oldest_of_a_page_runs_first(several: TaskQueue) -> None:
    assert await several.dead.retry(queue="default") == 3
    assert ids(await taken(await several.broker())) == ["a", "b", "c"]


async def test_a_dead_task_has_the_note_of_the_last_crash(app: TaskQueue) -> None:
    note = "worker process 7 was killed by signal 9; it used 900 MiB"
    details = msgspec.json.encode(DeathDetails(task="t.add", worker="w2", crash_note=note))
    await bury(app, "a", details=details)
    (one,) = await app.dead.list()
    assert (one.crash_note, one.worker, one.attempts) == (note, "w2", ())
