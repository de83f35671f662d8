"""Dead letters, listed, revived and discarded. The key of a letter is its number in the table."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DeadLetter
from aiotaskq.drivers.common.batches import slices
from aiotaskq.drivers.common.dead_letter_keys import number_before, number_of_key
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.postgres.connection import Connection, PostgresPool
from aiotaskq.drivers.postgres.maintenance import STEP_ROWS
from aiotaskq.drivers.postgres.messages import count_by_queue, insert
from aiotaskq.drivers.postgres.names import PostgresNames
from aiotaskq.drivers.postgres.notify import PostgresNotifier
from aiotaskq.drivers.postgres.sql import dead_letters as dead_letters_sql
from aiotaskq.drivers.postgres.sql import messages as messages_sql
from aiotaskq.drivers.postgres.storable import is_storable
from aiotaskq.errors import BatchRefused


async def read(pool: PostgresPool, queue: str, limit: int, before: str | None) -> list[DeadLetter]:
    """Return letters of a queue, the newest first; see `Broker.dead`.

    Raises:
        ConfigError: `before` is not a key.
        Unavailable: The server cannot be reached now.
    """
    number = number_before(before)
    if not is_storable(queue):  # nothing has such a name
        return []
    return [
        DeadLetter(
            key=str(row["seq"]),
            id=row["id"],
            queue=queue,
            body=row["body"],
            reason=row["reason"],
            crashes=row["crashes"],
            died_at=row["died_at"],
            details=row["details"],
        )
        for row in await pool.fetch(dead_letters_sql.NEWEST, queue, number, limit)
    ]


async def revive(
    pool: PostgresPool,
    notifier: PostgresNotifier,
    queue: str,
    letters: Sequence[tuple[str, Envelope]],
    shift: float,
) -> list[str]:
    """Store envelopes in place of letters; return the keys of letters that were not there.

    Raises:
        BatchRefused: These envelopes can never be stored; the others are.
        Unavailable: The server cannot be reached now; some letters may be revived.
    """
    if not is_storable(queue):
        return [key for key, _ in letters]

    async def step(some: Sequence[tuple[str, Envelope]]) -> list[str]:
        async def work(connection: Connection) -> tuple[list[str], list[Envelope]]:
            return await _revive(connection, pool.names, queue, some, shift)

        missing, found = await pool.transact(work, repeat=False)
        await notifier.wake(count_by_queue(found))
        return missing

    absent: list[str] = []
    refused: dict[int, Exception] = {}
    first = 0  # the position of the first letter of a step
    for some in slices(letters, STEP_ROWS):
        try:
            absent += await step(some)
        except UnstorableValue:  # nothing of the step is stored; each by itself shows which it is
            for at, one in enumerate(some, first):
                try:
                    absent += await step([one])
                except UnstorableValue as error:
                    refused[at] = error
        first += len(some)
    if refused:
        raise BatchRefused(refused, answer=absent)
    return absent


async def discard(pool: PostgresPool, queue: str, keys: Collection[str]) -> int:
    """Delete letters; return how many there were.

    Raises:
        Unavailable: The server cannot be reached now.
    """
    numbers = {number for key in keys if (number := number_of_key(key)) is not None}
    if not is_storable(queue):
        return 0
    return len(await pool.fetch(dead_letters_sql.REMOVE, queue, list(numbers)))


async def _revive(
    connection: Connection,
    names: PostgresNames,
    queue: str,
    letters: Sequence[tuple[str, Envelope]],
    shift: float,
) -> tuple[list[str], list[Envelope]]:
    """Return the keys of absent letters, and the envelopes stored in place of the others."""
    numbers = {key: number for key, _ in letters if (number := number_of_key(key)) is not None}
    rows = await connection.fetch(
        names.render(dead_letters_sql.REMOVE), queue, list(numbers.values())
    )
    removed = {row["seq"] for row in rows}
    absent: list[str] = []
    found: list[Envelope] = []
    for key, envelope in letters:
        if numbers.get(key) in removed:
            removed.discard(numbers[key])  # a key given twice is absent the second time
            found.append(envelope)
        else:
            absent.append(key)
    await connection.fetch(names.render(messages_sql.UNCANCEL), [one.id for one in found])
    unique = [one.id for one in found if one.unique]
    if unique:
        await connection.fetch(names.render(messages_sql.CLAIM), shift, unique)
    # The ids are claimed now, so `insert` would refuse them as unique ones.
    plain = [msgspec.structs.replace(one, unique=False) for one in found]
    await insert(connection.fetch, names, plain, shift=shift)
    return absent, found
