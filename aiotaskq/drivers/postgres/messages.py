"""Envelopes stored as rows, in the driver's own transaction or in a caller's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, TypeAlias

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.common.batches import portions
from aiotaskq.drivers.postgres.connection import STATEMENT_BYTES
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.drivers.postgres.sql import messages as messages_sql

_CHUNK_ROWS = 1000

Execute: TypeAlias = Callable[..., Awaitable[Sequence[Any]]]
"""Runs a statement with its parameters and returns its rows, as `fetch` of a connection does."""


async def insert(
    execute: Execute,
    names: PostgresNames,
    batch: Sequence[Envelope],
    *,
    shift: float = 0.0,
    call_id: str | None = None,
) -> Collection[str]:
    """Store envelopes; return the ids refused because they were stored before.

    No consumer is notified. The caller does that: with `notify_on_commit` inside a transaction, or
    with `PostgresNotifier.wake` after the commit.

    Args:
        execute: Runs the statements. If its connection is in no transaction, each chunk of the
            batch is a transaction of its own.
        names: The names of the tables.
        batch: Envelopes, any number.
        shift: The offset of the clock in seconds, for tests.
        call_id: As in `Broker.publish`.
    """
    refused: dict[str, None] = {}
    claimed: set[str] = set()
    sizes = [len(one.body) for one in batch]
    chunks = portions(batch, sizes, most=_CHUNK_ROWS, most_bytes=STATEMENT_BYTES)
    for number, chunk in enumerate(chunks):
        # An id for each chunk: if the call fails after some of them, a repeated call skips those.
        call = None if call_id is None else f"{call_id}:{number}"
        template, arguments = _statement(chunk, claimed, refused)
        rows = await execute(names.render(template), shift, call, *arguments)
        refused.update((row["id"], None) for row in rows)
    return refused.keys()


async def notify_on_commit(execute: Execute, names: PostgresNames) -> None:
    """Make every waiting consumer look for messages when the transaction commits."""
    await execute(messages_sql.NOTIFY, names.channel("wake"))


def count_by_queue(batch: Sequence[Envelope]) -> dict[str, int]:
    """Return the number of envelopes for each queue."""
    counts: dict[str, int] = {}
    for one in batch:
        counts[one.queue] = counts.get(one.queue, 0) + 1
    return counts


def _statement(
    chunk: Sequence[Envelope], claimed: set[str], refused: dict[str, None]
) -> tuple[str, list[list[Any]]]:
    """Return the statement that stores a chunk, and its arguments.

    A statement cannot insert an id twice, so an id that is repeated is refused here.

    Args:
        chunk: The envelopes.
        claimed: The unique ids of the batch so far; those of this chunk are added.
        refused: The ids refused so far; repeated ones of this chunk are added.
    """
    rows = [one for one in chunk if not (one.unique and _is_repeated(one.id, claimed, refused))]
    arguments: list[list[Any]] = [
        [one.id for one in rows],
        [one.queue for one in rows],
        [one.priority for one in rows],
        [one.body for one in rows],
    ]
    if all(map(_is_plain, rows)):
        return messages_sql.ADD, arguments
    arguments += [
        [one.not_before for one in rows],
        [one.delay for one in rows],
        [one.expires_at for one in rows],
        [one.expires_in for one in rows],
        [one.unique for one in rows],
    ]
    return messages_sql.ADD_ANY, arguments


def _is_repeated(name: str, claimed: set[str], refused: dict[str, None]) -> bool:
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
