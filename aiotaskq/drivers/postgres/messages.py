"""Storing envelopes: on a connection of the driver's or a caller's own, in whatever transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.postgres import sql
from aiotaskq.drivers.postgres.names import Names

_CHUNK_ROWS = 1000
_CHUNK_BYTES = 4 * 1024 * 1024

BUDGET = 1000
"""Rows that one step of housekeeping touches at most, so that no transaction takes long."""


Run: TypeAlias = Callable[..., Awaitable[Sequence[Any]]]
"""What runs a statement with its parameters and returns its rows: `fetch` of a connection."""


async def insert(
    run: Run,
    names: Names,
    batch: Sequence[Envelope],
    *,
    shift: float = 0.0,
    call_id: str | None = None,
) -> Collection[str]:
    """Store envelopes; return the ids refused because they were stored before.

    Nobody is told: see `announce`, and `Bell.wake` for after the commit.

    Args:
        run: On a connection in a transaction, or not; then each thousand is one of its own.
        names: Of the tables.
        batch: Of any size.
        shift: Seconds that the clock is ahead, for tests.
        call_id: As in `Broker.publish`.
    """
    refused: dict[str, None] = {}
    claimed: set[str] = set()
    for number, chunk in enumerate(_chunks(batch)):
        call = None if call_id is None else f"{call_id}:{number}"
        template, arguments = _statement(chunk, claimed, refused)
        rows = await run(names.render(template), shift, call, *arguments)
        refused.update((row["id"], None) for row in rows)
    return refused.keys()


async def announce(run: Run, names: Names) -> None:
    """Have everybody who waits look again, as soon as the transaction commits."""
    await run(sql.ANNOUNCE, names.channel("wake"))


def counted(batch: Sequence[Envelope]) -> dict[str, int]:
    """Return how many envelopes there are for each queue."""
    counts: dict[str, int] = {}
    for one in batch:
        counts[one.queue] = counts.get(one.queue, 0) + 1
    return counts


def _statement(
    chunk: Sequence[Envelope], claimed: set[str], refused: dict[str, None]
) -> tuple[str, list[list[Any]]]:
    """Return what stores a chunk; note the unique ids in it, and those that come again."""
    rows = [one for one in chunk if not (one.unique and _comes_again(one.id, claimed, refused))]
    arguments: list[list[Any]] = [
        [one.id for one in rows],
        [one.queue for one in rows],
        [one.priority for one in rows],
        [one.body for one in rows],
    ]
    if all(map(_is_plain, rows)):
        return sql.ADD, arguments
    arguments += [
        [one.not_before for one in rows],
        [one.delay for one in rows],
        [one.expires_at for one in rows],
        [one.expires_in for one in rows],
        [one.unique for one in rows],
    ]
    return sql.ADD_ANY, arguments


def _comes_again(name: str, claimed: set[str], refused: dict[str, None]) -> bool:
    if name in claimed:
        refused[name] = None
        return True
    claimed.add(name)
    return False


def _is_plain(one: Envelope) -> bool:
    return (
        not one.unique
        and one.not_before is None
        and one.delay is None
        and one.expires_at is None
        and one.expires_in is None
    )


def _chunks(batch: Sequence[Envelope]) -> Iterator[Sequence[Envelope]]:
    """Cut into pieces that one statement may carry."""
    start, size = 0, 0
    for number, one in enumerate(batch):
        own = len(one.body)
        if number > start and (number - start == _CHUNK_ROWS or size + own > _CHUNK_BYTES):
            yield batch[start:number]
            start, size = number, 0
        size += own
    if start < len(batch):
        yield batch[start:]
