"""Outcomes in a process that nobody reads: for how long, and how many are in memory."""

from __future__ import annotations

import asyncio
import sqlite3

import msgspec
import pytest

from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.drivers.rabbitmq import RabbitBackend, outcomes, results
from aiotaskq.drivers.rabbitmq.outcomes import RabbitOutcomes

PATIENCE = 30.0


def outcome(
    name: str, size: int, *, reply_to: str | None = None, status: TaskStatus = TaskStatus.SUCCESS
) -> Outcome:
    return Outcome(
        task_id=name,
        status=status,
        result=msgspec.Raw(b'"' + b"x" * size + b'"'),
        reply_to=reply_to or msgspec.UNSET,
    )


async def settled(kept: RabbitOutcomes) -> None:
    async with asyncio.timeout(PATIENCE):
        while kept._spilling:
            await asyncio.sleep(0.005)


async def test_results_beyond_a_limit_are_on_disk_and_all_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outcomes, "_MOST_BYTES", 1_000_000)
    kept = RabbitOutcomes()
    names = [f"{number}" for number in range(400)]
    for name in names:
        kept.put([outcome(name, 50_000)])
        await settled(kept)
        assert kept._size <= 1_100_000
    assert kept.put([outcome("0", 1)]) == ["0"], "the first final outcome stays, on disk as well"
    for name in names:
        found = await kept.get([name])
        assert memoryview(found[name].result).nbytes == 50_002
    assert len(await kept.get(names)) == 400
    assert kept.forget(names[:399]) == 399
    await kept.sweep()
    assert set(await kept.get(names)) == {"399"}
    kept.forget(names)
    await kept.sweep()
    assert (kept._size, kept._disk._database) == (0, None)


async def test_an_interim_outcome_on_disk_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "_MOST_BYTES", 10_000)
    kept = RabbitOutcomes()
    kept.put([outcome("a", 9000, status=TaskStatus.STARTED), outcome("b", 9000)])
    await settled(kept)
    assert (await kept.get(["a"]))["a"].status is TaskStatus.STARTED
    assert not kept.put([outcome("a", 1)])
    await kept.sweep()
    assert (await kept.get(["a"]))["a"].status is TaskStatus.SUCCESS


async def test_results_are_kept_where_the_disk_takes_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(outcomes, "_MOST_BYTES", 10_000)
    kept = RabbitOutcomes()
    monkeypatch.setattr(kept._disk, "write", fail)
    for name in "abc":
        kept.put([outcome(name, 9000)])
        await settled(kept)
    assert len(await kept.get("abc")) == 3
    assert len([one for one in caplog.records if "written to the disk" in one.message]) == 1


async def test_a_received_result_is_gone_when_its_time_is_over(
    url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_SWEEP_EVERY", 0.05)
    sender = RabbitBackend(url, prefix=prefix)
    await sender.open()
    address = await sender.reply_address()
    arriving = sender.subscribe()
    assert await anext(arriving) == []
    worker = RabbitBackend(url, prefix=prefix)
    await worker.open()
    assert not await worker.store([outcome("short", 10, reply_to=address)], 1.0)
    assert not await worker.store([outcome("long", 10, reply_to=address)], 1000.0)
    names: set[str] = set()
    async with asyncio.timeout(PATIENCE):
        while "long" not in names:
            names |= {one.task_id for one in await anext(arriving) if isinstance(one, Outcome)}
        while "short" in sender._outcomes._entries:
            await asyncio.sleep(0.01)
    assert set(await sender.load(["short", "long"])) == {"long"}
    await arriving.aclose()
    await worker.close()
    await sender.close()
