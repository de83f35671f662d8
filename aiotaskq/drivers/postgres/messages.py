"""Envelopes stored as rows, in the driver's own transaction or in a caller's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any, TypeAlias

from aiotaskq.contract.message import Envelope
from aiotaskq.drivers.common.batches import portions
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.postgres.connection import (
    STATEMENT_BYTES,
    UNSTORABLE_ERRORS,
)
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from aiotaskq.drivers.postgres.storable import is_storable

_CHUNK_ROWS = 1000
_LARGEST_BODY = 1_000_000_000  # bytes; a value has 1 GiB at most, and the array around it as well

Execute: TypeAlias = Callable[..., Awaitable[Sequence[Any]]]
"""Runs a statement with its parameters and returns its rows, as `fetch` of a connection does."""


async def insert(
    execute: Execute,
    names: PostgresNames,
    batch: Sequence[Envelope],
    *,
    shift: float = 0.0,
    call_id: str | None = None,
    errors: dict[int, Exception] | None = None,
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
        errors: Gets the envelopes that PostgreSQL cannot store, by their positions, and the others
            are stored; only where the connection is in no transaction. None: the first one raises.

    Raises:
        UnstorableValue: PostgreSQL cannot store an envelope, and `errors` is None.
    """
    refused: dict[str, None] = {}
    rows = _without_repeated(batch, refused)
    sizes = [len(one.body) for one in rows]
    chunks = portions(rows, sizes, most=_CHUNK_ROWS, most_bytes=STATEMENT_BYTES)
    unstorable: dict[int, Exception] = {}  # by identity

    async def store(chunk: Sequence[Envelope], call: str | None) -> None:
        template, arguments = _statement(chunk)
        found = await execute(names.render(template), shift, call, *arguments)
        refused.update((row["id"], None) for row in found)

    for number, chunk in enumerate(chunks):
        # An id for each chunk: if the call fails after some of them, a repeated call skips those.
        call = None if call_id is None else f"{call_id}:{number}"
        try:
            await store(chunk, call)
        except (UnstorableValue, *UNSTORABLE_ERRORS):
            if errors is None:
                raise
            for place, one in enumerate(chunk):
                try:
                    await store([one], None if call is None else f"{call}:{place}")
                except UnstorableValue as error:
                    unstorable[id(one)] = error
    if errors is not None and unstorable:
        errors.update(
            (place, unstorable[id(one)]) for place, one in enumerate(batch) if id(one) in unstorable
        )
    return refused.keys()


def check_storable(batch: Sequence[Envelope]) -> None:
    """Refuse envelopes before any of them is sent, in a transaction that an error would end.

    Raises:
        UnstorableValue: PostgreSQL cannot store one of them.
    """
    for one in batch:
        for text in (one.id, one.queue):
            if not is_storable(text):
                raise UnstorableValue(f"PostgreSQL cannot store the text {text!r:.200}")


async def notify_on_commit(execute: Execute, names: PostgresNames) -> None:
    """Make every waiting consumer look for messages when the transaction commits."""
    await execute(messages_sql.NOTIFY, names.channel("wake"))


def count_by_queue(batch: Sequence[Envelope]) -> dict[str, int]:
    """Return the number of envelopes for each queue."""
    counts: dict[str, int] = {}
    for one in batch:
        counts[one.queue] = counts.get(one.queue, 0) + 1
    return counts


def _without_repeated(batch: Sequence[Envelope], refused: dict[str, None]) -> Sequence[Envelope]:
    """Return the envelopes without those that repeat a unique id, which are noted as refused.

    One statement cannot insert an id twice.
    """
    if not any(one.unique for one in batch):
        return batch
    claimed: set[str] = set()
    rows: list[Envelope] = []
    for one in batch:
        if one.unique and one.id in claimed:
            refused[one.id] = None
            continue
        if one.unique:
            claimed.add(one.id)
        rows.append(one)
    return rows


def _statement(rows: Sequence[Envelope]) -> tuple[str, list[list[Any]]]:
    """Return the statement that stores envelopes, and its arguments."""
    if len(rows) == 1 and len(rows[0].body) > _LARGEST_BODY:  # those are alone in their chunk
        raise UnstorableValue(f"PostgreSQL cannot store a body of {len(rows[0].body):,} bytes")
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


def _is_plain(one: Envelope) -> bool:
    return (
        not one.unique
        and one.not_before is None
        and one.delay is None
        and one.expires_at is None
        and one.expires_in is None
    )
