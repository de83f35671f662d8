"""Dead letters of a Redis store: read, revived, discarded.

The key of a letter is the time of its death as text, such as ``1785255200.123456``, and the
member of the sorted set ``dead``, with the same time as its score. So a key of that form is a
place in the order of deaths, whether its letter still exists or not. Other programs may have put
members of another form into the set. Such letters are listed, too, and their keys are known as
long as they exist.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress

import msgspec

from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DeadLetter
from aiotaskq.drivers.common.batches import portions, slices
from aiotaskq.drivers.common.dead_letter_keys import not_a_key
from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.client import MAX_BYTES, MAX_ENTRIES, RedisClient
from aiotaskq.drivers.redis.connection import Word
from aiotaskq.errors import BatchRefused, EncodeError

_KEY = re.compile(r"(0|[1-9][0-9]{0,11})\.[0-9]{6}")  # as `add_dead_letter` in shared.lua writes it
_HEX = "bytes:"  # the beginning of the text of a key that is no text itself
_LETTERS = 100  # read in one call of a script


class _LetterHead(msgspec.Struct):
    died_at: float
    reason: str
    details: int = 0  # bytes between the head and the item


_decode_head = msgspec.json.Decoder(_LetterHead).decode


class RedisDeadLetters:
    """The dead letters of all queues of a store.

    Args:
        client: The client of the broker.
        introduce: Adds queues to the set of all queues, before anything is stored in them.
    """

    def __init__(
        self, client: RedisClient, introduce: Callable[[Collection[str]], Awaitable[None]]
    ) -> None:
        self._client = client
        self._introduce = introduce

    async def read(self, queue: str, limit: int, before: str | None) -> list[DeadLetter]:
        """Return letters of a queue, the newest first.

        Raises:
            ConfigError: `before` is not a key that this store gives to letters.
        """
        time = None
        if before is not None:
            time = await self.time_of(queue, before)
            if time is None:
                raise not_a_key(before)
        return [letter for _, letter in await self.read_timed(queue, limit, time)]

    async def time_of(self, queue: str, key: str) -> float | None:
        """Return the time of death that a key stands for; None if no letter can have the key."""
        if _KEY.fullmatch(key):
            return float(key)
        if not items.is_text(key):
            return None
        base = self._client.keys.base(queue)
        score = await self._client.connection.command("ZSCORE", f"{base}dead", _key_bytes(key))
        return None if score is None else float(score)

    async def read_timed(
        self, queue: str, limit: int, before: float | None
    ) -> list[tuple[float, DeadLetter]]:
        """Return letters that died before a time, the newest first, each with its time."""
        letters: list[tuple[float, DeadLetter]] = []
        keys = [self._client.keys.base(queue)]
        last: Word = "" if before is None else repr(before)
        while (most := min(limit - len(letters), _LETTERS)) > 0:
            reply = await self._client.connection.script(scripts.DEAD, keys, [last, most])
            for key, time, letter in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
                letters.append((float(time), unpack_letter(key, letter, queue)))
            if len(reply) < 3 * most:
                break
            last = reply[-2]
        return letters

    async def revive(self, queue: str, letters: Sequence[tuple[str, Envelope]]) -> Collection[str]:
        """Store an envelope in place of each letter; return the keys of missing letters."""
        refused = unstorable_letters(letters)
        if refused:
            fine = [one for place, one in enumerate(letters) if place not in refused]
            raise BatchRefused(refused, answer=await self.revive(queue, fine))
        await self._introduce({envelope.queue for _, envelope in letters})
        missing = [key for key, _ in letters if not items.is_text(key)]
        letters = [one for one in letters if items.is_text(one[0])]
        keys_of = self._client.keys
        sizes = [len(envelope.body) for _, envelope in letters]
        for part in portions(letters, sizes, most=MAX_ENTRIES, most_bytes=MAX_BYTES):
            keys = [keys_of.base(queue), keys_of.ids, keys_of.cancelled]
            args: list[Word] = [self._client.time_shift]
            for key, envelope in part:
                base = keys_of.base(envelope.queue)
                if base not in keys[3:]:
                    keys.append(base)
                due, item = items.pack_with_due(envelope, self._client.serials)
                target = keys.index(base, 3) + 1
                unique = "1" if envelope.unique else ""
                args += (
                    _key_bytes(key),
                    target,
                    items.pack_id(envelope.id),
                    envelope.id,
                    unique,
                    due,
                    item,
                )
            reply = await self._client.connection.script(scripts.REVIVE, keys, args)
            missing += map(_key_text, reply)
        return missing

    async def discard(self, queue: str, keys: Collection[str]) -> int:
        """Drop letters; return how many existed."""
        count = 0
        base = self._client.keys.base(queue)
        known = [_key_bytes(key) for key in set(keys) if items.is_text(key)]
        for part in slices(known, MAX_ENTRIES):
            count += await self._client.connection.script(scripts.DISCARD, [base], part)
        return count


def unstorable_letters(letters: Sequence[tuple[str, Envelope]]) -> dict[int, Exception]:
    """Return why envelopes cannot be stored in place of letters, by their positions."""
    return {
        place: EncodeError(f"Redis cannot store the id {envelope.id!r:.200}")
        for place, (_, envelope) in enumerate(letters)
        if not (items.is_text(envelope.id) and items.is_text(envelope.queue))
    }


def _key_text(key: bytes) -> str:
    """Return a key as text; one that is none as its bytes in hexadecimal."""
    try:
        return key.decode()
    except UnicodeDecodeError:
        return f"{_HEX}{key.hex()}"


def _key_bytes(key: str) -> bytes:
    """Return the bytes of a key that `_key_text` has given."""
    if key.startswith(_HEX):
        with suppress(ValueError):
            return bytes.fromhex(key[len(_HEX) :])
    return key.encode()


def unpack_letter(key: bytes, letter: bytes, queue: str) -> DeadLetter:
    """Return a dead letter as `add_dead_letter` in shared.lua wrote it."""
    head, _, rest = letter.partition(b"\n")
    try:
        death = _decode_head(head)
    except (
        msgspec.MsgspecError,
        UnicodeError,
        RecursionError,
    ):  # not written by a script, so all of it is payload
        death, rest = _LetterHead(0.0, "not a dead letter"), letter
    dead = items.unpack(rest[death.details :], queue, None)
    return DeadLetter(
        key=_key_text(key),
        id=dead.id,
        queue=queue,
        body=dead.body,
        reason=death.reason,
        crashes=dead.crashes,
        died_at=death.died_at,
        details=rest[: death.details],
    )
