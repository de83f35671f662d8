"""Dead letters: read, revived, discarded. The key of one is its number in the table."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DeadLetter
from aiotaskq.drivers.postgres import sql
from aiotaskq.drivers.postgres.link import Connection, Link
from aiotaskq.drivers.postgres.messages import BUDGET, counted, insert
from aiotaskq.drivers.postgres.names import Names
from aiotaskq.drivers.postgres.waking import Bell
from aiotaskq.errors import ConfigError

_LAST = 2**63 - 1  # the largest number that there is


async def read(link: Link, queue: str, limit: int, before: str | None) -> list[DeadLetter]:
    """Return letters of a queue, the newest first, older ones than `before` if that is given.

    Raises:
        ConfigError: That is no key.
        Unavailable: The server cannot be reached now.
    """
    edge = _LAST if before is None else _number(before)
    if edge is None:
        raise ConfigError(f"{before!r} is no key of a dead letter: take one of those listed")
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
        for row in await link.fetch(sql.NEWEST_DEAD, queue, edge, limit)
    ]


async def revive(
    link: Link, bell: Bell, queue: str, letters: Sequence[tuple[str, Envelope]], shift: float
) -> list[str]:
    """Store envelopes in place of letters; return the keys not found.

    Raises:
        Unavailable: The server cannot be reached now; some may have been revived.
    """
    absent: list[str] = []
    for start in range(0, len(letters), BUDGET):
        some = letters[start : start + BUDGET]

        async def work(
            connection: Connection, some: Sequence[tuple[str, Envelope]] = some
        ) -> tuple[list[str], list[Envelope]]:
            return await _revive(connection, link.names, queue, some, shift)

        missing, found = await link.transact(work, repeat=False)
        absent += missing
        await bell.wake(counted(found))
    return absent


async def discard(link: Link, queue: str, keys: Collection[str]) -> int:
    """Drop letters; return how many there were.

    Raises:
        Unavailable: The server cannot be reached now.
    """
    numbers = {number for key in keys if (number := _number(key)) is not None}
    return len(await link.fetch(sql.TAKE_DEAD, queue, list(numbers)))


async def _revive(
    connection: Connection,
    names: Names,
    queue: str,
    letters: Sequence[tuple[str, Envelope]],
    shift: float,
) -> tuple[list[str], list[Envelope]]:
    numbers = {key: number for key, _ in letters if (number := _number(key)) is not None}
    rows = await connection.fetch(names.render(sql.TAKE_DEAD), queue, list(numbers.values()))
    there = {row["seq"] for row in rows}
    absent: list[str] = []
    found: list[Envelope] = []
    for key, envelope in letters:
        if numbers.get(key) in there:
            there.discard(numbers[key])  # the same key again finds it gone
            found.append(envelope)
        else:
            absent.append(key)
    await connection.fetch(names.render(sql.LIFT_CANCEL), [one.id for one in found])
    unique = [one.id for one in found if one.unique]
    if unique:
        await connection.fetch(names.render(sql.CLAIM_ANYHOW), shift, unique)
    # Those are claimed already, and so would be refused.
    plain = [msgspec.structs.replace(one, unique=False) for one in found]
    await insert(connection.fetch, names, plain, shift=shift)
    return absent, found


def _number(key: str) -> int | None:
    """Return the number that a key is, or None if it is none."""
    if not (key.isascii() and key.isdigit()) or len(key) > len(str(_LAST)):
        return None
    return min(int(key), _LAST)
