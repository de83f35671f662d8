"""Outcomes with values that PostgreSQL cannot store."""

from __future__ import annotations

import msgspec
import pytest
from msgspec import UNSET, Raw

from aiotaskq.contract.message import Attempt
from aiotaskq.contract.outcome import RemoteError, TaskStatus
from aiotaskq.encoding.codec import Codec
from aiotaskq.errors import BatchRefused
from tests.drivers.postgres.tools import (
    HISTORY,
    Make,
    heard,
    outcome,
    until_heard,
)

IMPOSSIBLE = {
    "lone surrogate": b'"\\ud800"',
    "huge number": b"1e200000",
    "deep": b"[" * 20_000 + b"]" * 20_000,
    "not JSON": b"\x81\xff",
    "not UTF-8": b'"\xff"',
    "empty": b"",
}


@pytest.mark.parametrize("result", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
async def test_a_result_that_cannot_be_stored_is_a_failure_that_says_so(
    make: Make, result: bytes
) -> None:
    backend = await make()
    batch = [outcome(f"{n}", str(n).encode()) for n in range(700)]
    batch[123] = outcome("123", result, name="tasks.odd")
    async with heard(backend) as arrived:
        assert not await backend.store(batch, None)
        await until_heard(arrived, {one.task_id for one in batch})
    loaded = dict(await backend.load([one.task_id for one in batch]))
    odd = loaded.pop("123")
    assert {one: bytes(other.result) for one, other in loaded.items()} == {
        f"{n}": str(n).encode() for n in range(700) if n != 123
    }
    assert (odd.status, odd.name) == (TaskStatus.FAILURE, "tasks.odd")
    error = msgspec.json.decode(odd.result, type=RemoteError)
    assert error.exc_type == "EncodeError"
    assert "PostgreSQL cannot keep the result" in error.exc_message[0]
    assert list(await backend.store([outcome("123")], None)) == ["123"]


@pytest.mark.parametrize("value", ["\0", {"a\0": ["b\0", None]}, {"$text": "\0"}], ids=repr)
async def test_a_value_with_nul_comes_back_as_it_was(make: Make, value: object) -> None:
    backend = await make()
    codec = Codec()
    await backend.store([outcome("a", bytes(codec.encode_result(value))), outcome("b")], None)
    loaded = await backend.load(["a", "b"])
    assert loaded["a"].status is TaskStatus.SUCCESS
    assert codec.decode_result(loaded["a"].result) == value


async def test_nul_in_an_error_is_escaped(make: Make) -> None:
    backend = await make()
    error = RemoteError("ValueError", ["embedded \0 byte", 3], "builtins")
    failed = outcome(
        "a",
        msgspec.json.encode(error),
        status=TaskStatus.FAILURE,
        traceback="line\0\udc80",
        args=Raw(b'["\\u0000"]'),
        worker="w",
    )
    await backend.store([failed], None)
    loaded = (await backend.load(["a"]))["a"]
    assert loaded.status is TaskStatus.FAILURE
    assert msgspec.json.decode(loaded.result, type=RemoteError) == RemoteError(
        "ValueError", ["embedded \\x00 byte", 3], "builtins"
    )
    assert loaded.traceback == "line\\x00\\udc80"
    assert (loaded.args, loaded.worker) == (UNSET, "w")


async def test_a_history_that_cannot_be_stored_is_escaped(make: Make) -> None:
    backend = await make()
    odd = Attempt(number=1, at=1.0, worker="w\0", error="a\0b", traceback="c\udc80")
    await backend.store([outcome("a", history=(odd, *HISTORY)), outcome("b")], None)
    loaded = await backend.load(["a", "b"])
    assert loaded["a"].status is TaskStatus.SUCCESS
    shown = Attempt(number=1, at=1.0, worker="w\\x00", error="a\\x00b", traceback="c\\udc80")
    assert loaded["a"].history == (shown, *HISTORY)
    assert loaded["b"].status is TaskStatus.SUCCESS


async def test_arguments_that_cannot_be_stored_do_not_fail_the_task(make: Make) -> None:
    backend = await make()
    await backend.store(
        [outcome("a", b'"fine"', args=Raw(b'["\\u0000"]'), kwargs=Raw(b"{}"))], None
    )
    loaded = (await backend.load(["a"]))["a"]
    assert (loaded.status, bytes(loaded.result)) == (TaskStatus.SUCCESS, b'"fine"')
    assert loaded.args is UNSET


@pytest.mark.parametrize("task_id", ["a\0b", "\ud800"])
async def test_an_id_that_cannot_be_stored_harms_no_other(make: Make, task_id: str) -> None:
    backend = await make()
    with pytest.raises(BatchRefused) as refused:
        await backend.store([outcome("a"), outcome(task_id), outcome("b")], None)
    assert list(refused.value.errors) == [1]
    assert set(await backend.load(["a", task_id, "b"])) == {"a", "b"}
    assert await backend.forget(["a", task_id]) == 1


async def test_an_id_too_long_for_a_notice_is_found_by_looking(make: Make) -> None:
    backend = await make()
    long = "x" * 1500
    async with heard(backend) as arrived:
        await backend.store([outcome(long), outcome("short")], None)
        await until_heard(arrived, {""})
    assert set(await backend.load([long, "short"])) == {long, "short"}


async def test_ids_of_odd_lengths_fit_their_notices(make: Make) -> None:
    backend = await make()
    ids = {f"{n}" + '"\\é' * (n % 290) for n in range(600)}
    async with heard(backend) as arrived:
        await backend.store([outcome(one) for one in ids], None)
        # Some are too long: for those there is an empty item.
        await until_heard(arrived, {one for one in ids if len(msgspec.json.encode(one)) < 800})
