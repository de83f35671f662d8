"""Consumers of a file that was replaced: they act on nothing that others hold in the new one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Depth
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.drivers.sqlite.consumer import SQLiteConsumer
from aiotaskq.errors import LeaseLost
from tests.drivers.sqlite.tools import NEVER, envelope, names


class Twins(NamedTuple):
    """Two consumers with the same number and a message each with the same receipt.

    The first one has them in a file that is gone, the second one in the file that is there now.
    """

    first: SQLiteConsumer
    old: Delivery
    broker: SQLiteBroker
    second: SQLiteConsumer
    new: Delivery

    async def check(self) -> None:
        """Make sure that the second consumer is as it was."""
        assert await self.broker.depth() == {"q": Depth(held=1)}
        lease = self.broker.lease(self.second.grant)
        assert await lease.renew()
        await lease.close()
        assert not await self.second.settle([Done(self.new)])
        assert await self.broker.depth() == {}


@pytest.fixture
async def twins(broker: SQLiteBroker, url: str, path: Path) -> AsyncIterator[Twins]:
    first = broker.consumer(["q"], name="first", lease=NEVER)
    await first.open()
    await broker.publish([envelope("old")])
    # As a call of `fetch` that was cancelled: its job has run, and nobody has its messages.
    job = broker._connection.submit(partial(first._pick_if_any, limit=1, queues=["q"]))
    assert await broker.depth() == {"q": Depth(held=1)}
    [old] = job.result()[0]
    first._abandoned.append(job)
    for one in path.parent.glob(f"{path.name}*"):
        one.unlink()
    other = SQLiteBroker(url)
    await other.open()
    second = other.consumer(["q"], name="second", lease=NEVER)
    await second.open()
    await other.publish([envelope("new")])
    [new] = await second.fetch(1, 0)
    assert (old.receipt, first._number) == (new.receipt, second._number)
    yield Twins(first, old, other, second, new)
    await first.close()
    await second.close()
    await other.close()


@pytest.mark.parametrize("how", [Done, Release, Again, Dead])
async def test_a_settlement_of_the_old_file_settles_nothing_in_the_new_one(
    twins: Twins, how: type[Settlement]
) -> None:
    old = twins.old
    batch: dict[type[Settlement], Settlement] = {
        Done: Done(old),
        Release: Release(old),
        Again: Again(old, envelope("again")),
        Dead: Dead(old, "bad"),
    }
    assert names(await twins.first.settle([batch[how]])) == ["old"]
    await twins.check()


async def test_a_consumer_of_the_old_file_ends_no_other_when_it_is_closed(twins: Twins) -> None:
    await twins.first.close()
    await twins.check()


async def test_what_a_cancelled_fetch_took_from_the_old_file_is_not_handed_back_in_the_new_one(
    twins: Twins, broker: SQLiteBroker
) -> None:
    await broker._connection.run(twins.first._hand_back)
    await twins.check()


async def test_a_consumer_of_the_old_file_gets_no_messages_and_no_news_of_the_new_one(
    twins: Twins,
) -> None:
    await twins.broker.cancel(["new"], running=True)
    assert not (await twins.first.news()).cancelled
    assert (await twins.second.news()).cancelled == {"new"}
    with pytest.raises(LeaseLost):
        await twins.first.fetch(1, 0)
    await twins.check()
