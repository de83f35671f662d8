"""Conformance tests of storing, loading and forgetting outcomes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, ClassVar
from urllib.parse import urlsplit

import msgspec
import pytest
from msgspec import Raw

from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.contract.results import ResultBackend
from aiotaskq.testing.conformance.harness import ResultHarness
from aiotaskq.testing.conformance.result_listener import (
    listening,
    outcome,
    value,
)

FINAL = [TaskStatus.SUCCESS, TaskStatus.FAILURE, TaskStatus.REVOKED]
UNFINISHED = [TaskStatus.PENDING, TaskStatus.STARTED, TaskStatus.RETRY]


class StoreTests:
    """`ResultBackend.store`, `load` and `forget`.

    Attributes:
        ttl: The seconds that short-lived outcomes are kept. Lower it where the harness's
            `pass_time` really sleeps.
    """

    ttl: ClassVar[float] = 60.0

    @pytest.fixture
    async def backend(self, harness: ResultHarness) -> ResultBackend:
        return await harness.backend()

    async def test_opening_and_closing_twice_is_harmless(self, harness: ResultHarness) -> None:
        backend = await harness.backend()
        await backend.open()
        await backend.store([outcome("a")], None)
        await backend.close()
        await backend.close()

    async def test_a_clone_is_closed_and_works_on_the_same_store(
        self, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("a", value=1)], None)
        clone = backend.clone()
        assert type(clone) is type(backend)
        assert clone.url == backend.url
        await clone.close()  # a driver that is not open may be closed
        await clone.open()
        assert value((await clone.load(["a"]))["a"]) == 1
        await clone.close()
        assert "a" in await backend.load(["a"])

    async def test_the_wish_for_arguments_is_data_of_the_class(
        self, backend: ResultBackend
    ) -> None:
        assert isinstance(type(backend).wants_arguments, bool)

    async def test_the_url_shows_no_password(self, backend: ResultBackend) -> None:
        password = urlsplit(backend.url).password
        assert password is None or set(password) <= {"*"}

    async def test_a_stored_outcome_is_loaded_by_another_client(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        assert not await backend.store([outcome("a", value={"x": [1, None, "ü"]})], self.ttl)
        loaded = await (await harness.backend()).load(["a"])
        assert list(loaded) == ["a"]
        assert value(loaded["a"]) == {"x": [1, None, "ü"]}

    async def test_unknown_ids_are_absent(self, backend: ResultBackend) -> None:
        await backend.store([outcome("a")], None)
        assert list(await backend.load(["a", "b"])) == ["a"]
        assert not await backend.load(["b"])
        assert not await backend.load([])

    async def test_an_empty_batch_stores_nothing(self, backend: ResultBackend) -> None:
        assert not await backend.store([], None)

    async def test_every_field_comes_back(self, backend: ResultBackend) -> None:
        whole = Outcome(
            task_id="a",
            status=TaskStatus.FAILURE,
            result=Raw(b'{"exc_type":"E","exc_message":["\\"x\\"",1],"exc_module":"m"}'),
            traceback='Traceback:\n  File "x.py"\n\tü\n',
            children=["b", "c d"],
            date_done=datetime(2024, 2, 29, 12, 30, 15, 123456, tzinfo=UTC),
            name="pkg.task",
            worker="worker@host",
            queue="odd: {queue}",
            retries=3,
            execution_time=0.25,
            args=Raw(b'[1,"two",[3.5]]'),
            kwargs=Raw(b'{"k":{"n":null}}'),
        )
        await backend.store([whole], self.ttl)
        loaded = (await backend.load(["a"]))["a"]
        raw = {"result", "args", "kwargs"}
        for field in set(Outcome.__struct_fields__) - raw:
            assert getattr(loaded, field) == getattr(whole, field), field
        for field in raw:
            was, now = getattr(whole, field), getattr(loaded, field)
            assert msgspec.json.decode(now) == msgspec.json.decode(was), field

    async def test_fields_that_were_not_given_come_back_empty(self, backend: ResultBackend) -> None:
        bare = outcome("a", value=[])
        await backend.store([bare], None)
        loaded = (await backend.load(["a"]))["a"]
        for field in set(Outcome.__struct_fields__) - {"result"}:
            assert getattr(loaded, field) == getattr(bare, field), field

    @pytest.mark.parametrize(
        "stored",
        [None, False, 0, -1.5, 2**53, "", "a\nb\t'\"\\ü🐇", [], {}, [[{"a": {}}]], "x" * 2**20],
        ids=lambda stored: repr(stored)[:12],
    )
    async def test_every_json_value_comes_back(self, backend: ResultBackend, stored: Any) -> None:
        await backend.store([outcome("a", value=stored)], None)
        got = value((await backend.load(["a"]))["a"])
        assert got == stored
        assert type(got) is type(stored)

    async def test_a_nul_character_spoils_no_other_outcome(self, backend: ResultBackend) -> None:
        # Some stores cannot keep that character. The outcome is stored without it, and so are the
        # others of its batch.
        odd = Outcome(
            task_id="odd",
            status=TaskStatus.FAILURE,
            result=Raw(b'{"x\\u0000":"\\u0000"}'),
            traceback="a\x00b",
        )
        assert not await backend.store([outcome("a", value=1), odd, outcome("b", value=2)], None)
        loaded = await backend.load(["a", "odd", "b"])
        assert loaded["odd"].status is TaskStatus.FAILURE
        assert (value(loaded["a"]), value(loaded["b"])) == (1, 2)

    async def test_any_text_is_an_id(self, backend: ResultBackend) -> None:
        ids = ["two words", "grüße-🐇", "a:b", "{x}", "'; --", "%s*?[", "l\ni", "x" * 150]
        async with listening(backend) as listener:
            await backend.store([outcome(name, value=name) for name in ids], None)
            await listener.wait_for(ids)
        loaded = await backend.load(ids)
        assert {name: value(one) for name, one in loaded.items()} == {name: name for name in ids}

    @pytest.mark.parametrize("first", FINAL)
    @pytest.mark.parametrize("second", [*FINAL, *UNFINISHED])
    async def test_the_first_final_outcome_stays(
        self, backend: ResultBackend, first: TaskStatus, second: TaskStatus
    ) -> None:
        assert not await backend.store([outcome("a", first, 1)], None)
        assert list(await backend.store([outcome("a", second, 2)], None)) == ["a"]
        loaded = (await backend.load(["a"]))["a"]
        assert (loaded.status, value(loaded)) == (first, 1)

    @pytest.mark.parametrize("first", UNFINISHED)
    @pytest.mark.parametrize("second", [*FINAL, *UNFINISHED])
    async def test_an_outcome_that_is_not_final_is_replaced(
        self, backend: ResultBackend, first: TaskStatus, second: TaskStatus
    ) -> None:
        assert not await backend.store([outcome("a", first, 1)], None)
        assert not await backend.store([outcome("a", second, 2)], None)
        loaded = (await backend.load(["a"]))["a"]
        assert (loaded.status, value(loaded)) == (second, 2)

    async def test_only_the_late_outcomes_of_a_batch_are_refused(
        self, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("a", value=1), outcome("b", TaskStatus.STARTED)], None)
        batch = [outcome(name, value=2) for name in "abc"]
        assert list(await backend.store(batch, None)) == ["a"]
        loaded = await backend.load("abc")
        assert {name: value(one) for name, one in loaded.items()} == {"a": 1, "b": 2, "c": 2}

    async def test_the_first_final_outcome_of_an_id_within_a_batch_stays(
        self, backend: ResultBackend
    ) -> None:
        batch = [
            outcome("a", TaskStatus.STARTED, 1),
            outcome("a", TaskStatus.SUCCESS, 2),
            outcome("a", TaskStatus.FAILURE, 3),
        ]
        assert list(await backend.store(batch, None)) == ["a"]
        assert value((await backend.load(["a"]))["a"]) == 2

    async def test_one_of_several_clients_that_store_at_once_wins(
        self, harness: ResultHarness
    ) -> None:
        backends = [await harness.backend() for _ in range(4)]
        refused = await asyncio.gather(
            *(one.store([outcome("a", value=n)], None) for n, one in enumerate(backends))
        )
        assert sorted(map(len, refused)) == [0, 1, 1, 1]
        winner = next(n for n, one in enumerate(refused) if not one)
        assert value((await backends[0].load(["a"]))["a"]) == winner

    async def test_storing_the_same_batch_again_changes_nothing(
        self, backend: ResultBackend
    ) -> None:
        batch = [outcome("a", value=1), outcome("b", TaskStatus.FAILURE, 2)]
        assert not await backend.store(batch, None)
        assert sorted(await backend.store(batch, None)) == ["a", "b"]
        loaded = await backend.load("ab")
        assert {name: value(one) for name, one in loaded.items()} == {"a": 1, "b": 2}

    async def test_a_large_batch_is_stored_and_loaded(self, backend: ResultBackend) -> None:
        batch = [outcome(f"{n}", value=n) for n in range(5000)]
        assert not await backend.store(batch, self.ttl)
        loaded = await backend.load([f"{n}" for n in range(5001)])
        assert {name: value(one) for name, one in loaded.items()} == {
            f"{n}": n for n in range(5000)
        }

    async def test_an_outcome_is_absent_after_its_ttl(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("short")], self.ttl)
        await backend.store([outcome("long")], 10 * self.ttl)
        await backend.store([outcome("ever")], None)
        await harness.pass_time(self.ttl / 2)
        assert len(await backend.load(["short", "long", "ever"])) == 3
        await harness.pass_time(self.ttl / 2 + 1.0)
        assert set(await backend.load(["short", "long", "ever"])) == {"long", "ever"}
        assert await backend.forget(["short"]) == 0

    async def test_an_outcome_past_its_ttl_refuses_no_other(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("a", value=1)], self.ttl)
        await harness.pass_time(self.ttl + 1.0)
        assert not await backend.store([outcome("a", value=2)], self.ttl)
        assert value((await backend.load(["a"]))["a"]) == 2

    async def test_a_replacement_brings_its_own_ttl(
        self, harness: ResultHarness, backend: ResultBackend
    ) -> None:
        await backend.store([outcome("a", TaskStatus.STARTED)], self.ttl)
        await backend.store([outcome("a", value=1)], 10 * self.ttl)
        await backend.store([outcome("b", TaskStatus.STARTED)], 10 * self.ttl)
        await backend.store([outcome("b", value=1)], self.ttl)
        await harness.pass_time(self.ttl + 1.0)
        assert set(await backend.load("ab")) == {"a"}

    async def test_an_id_that_is_given_twice_counts_once(self, backend: ResultBackend) -> None:
        await backend.store([outcome(name) for name in "ab"], None)
        assert sorted(await backend.load(["a", "b", "a"])) == ["a", "b"]
        assert await backend.forget(["a", "a"]) == 1
        assert set(await backend.load("ab")) == {"b"}

    async def test_forget_deletes_and_counts(self, backend: ResultBackend) -> None:
        await backend.store([outcome(name) for name in "abc"], None)
        assert await backend.forget(["a", "b", "unknown"]) == 2
        assert await backend.forget(["a", "b"]) == 0
        assert await backend.forget([]) == 0
        assert set(await backend.load("abc")) == {"c"}
        assert not await backend.store([outcome("a", value=2)], None)
