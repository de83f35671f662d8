"""Outcomes in one Redis store: a readable key for each.

A final outcome has the key ``result:<id>``, which is written once. An outcome that is not final
has the key ``state:<id>``, which is deleted in the same step in which a final one is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.common.batches import portions, slices
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.client import MAX_BYTES, MAX_ENTRIES
from aiotaskq.drivers.redis.connection import RedisConnection, Word
from aiotaskq.drivers.redis.keys import RedisKeys
from aiotaskq.errors import BatchRefused, DecodeError

# So few and so small outcomes are published whole, so that subscribers need not load them.
_PUBLISHED = 8
_PUBLISHED_BYTES = 4096
_LOADED = 500  # outcomes in one command
_LONGEST_TTL = 100.0 * 365 * 86_400  # seconds; the server refuses one that is longer than its clock

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Outcome).decode


class RedisOutcomes:
    """Stores, loads and deletes outcomes; see `aiotaskq.contract.results.ResultBackend`.

    Args:
        connection: A connection to the store.
        keys: The names of its keys.
    """

    def __init__(self, connection: RedisConnection, keys: RedisKeys) -> None:
        self._connection = connection
        self._keys = keys
        # Ids of outcomes that may have been stored by a call that failed, or lost its reply.
        self._uncertain: set[str] = set()

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        refused: list[str] = []
        errors: dict[int, Exception] = {}
        encoded: list[tuple[Outcome, bytes]] = []
        places: dict[int, int] = {}  # of outcomes in the batch, by identity
        for place, outcome in enumerate(batch):
            places[id(outcome)] = place
            try:
                outcome.task_id.encode()
                encoded.append((outcome, _encode(outcome)))
            except (UnicodeEncodeError, RecursionError) as error:
                errors[place] = items.unstorable(error)
        try:
            sizes = [len(text) for _, text in encoded]
            for part in portions(encoded, sizes, most=MAX_ENTRIES, most_bytes=MAX_BYTES):
                try:
                    refused += await self._store(part, ttl)
                except UnstorableValue:  # the script did not run
                    for pair in part:
                        try:
                            refused += await self._store([pair], ttl)
                        except UnstorableValue as error:
                            errors[places[id(pair[0])]] = error
        except BaseException:
            self.mark_uncertain(batch)
            raise
        if self._uncertain:
            refused = await self._without_own(encoded, refused)
        if errors:
            raise BatchRefused(errors, answer=refused)
        return refused

    def mark_uncertain(self, batch: Sequence[Outcome]) -> None:
        """Note outcomes that may have been stored, though the caller was not told."""
        self._uncertain.update(outcome.task_id for outcome in batch)

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        found: dict[str, Outcome] = {}
        for part in slices([one for one in ids if items.is_text(one)], _LOADED):
            keys = [key for task_id in part for key in self._keys.outcome(task_id)]
            texts = await self._connection.command("MGET", *keys)
            for task_id, result, state in zip(part, texts[::2], texts[1::2], strict=True):
                text = state if result is None else result
                if text is not None:
                    found[task_id] = self._read(task_id, text)
        return found

    async def forget(self, ids: Collection[str]) -> int:
        count = 0
        for part in slices([one for one in set(ids) if items.is_text(one)], _LOADED):
            # An id has one of its two keys, or none. So the number of keys is that of the outcomes.
            keys = [key for task_id in part for key in self._keys.outcome(task_id)]
            count += await self._connection.command("DEL", *keys)
        return count

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _store(self, part: Sequence[tuple[Outcome, bytes]], ttl: float | None) -> list[str]:
        keys, pair = [self._keys.none], self._keys.outcome
        finals: list[tuple[str, bytes]] = []
        args: list[Word] = []
        for outcome, text in part:
            keys += pair(outcome.task_id)
            if outcome.status.final:
                finals.append((outcome.task_id, text))
                args += (b"1", text)
            else:
                args += (b"0", text)
        expiry = "" if ttl is None else max(1, round(min(ttl, _LONGEST_TTL) * 1000))
        args = [expiry, self._keys.results, *_published(finals), *args]
        refused = await self._connection.script(scripts.STORE, keys, args)
        return [part[position - 1][0].task_id for position in refused]

    async def _without_own(
        self, batch: Sequence[tuple[Outcome, bytes]], refused: list[str]
    ) -> list[str]:
        """Return the refused ids without those whose stored outcome is our own.

        An earlier call stored it, and its reply was lost.
        """
        asked = [task_id for task_id in refused if task_id in self._uncertain]
        keys = map(self._keys.result, asked)
        stored = await self._connection.command("MGET", *keys) if asked else ()
        self._uncertain.difference_update(outcome.task_id for outcome, _ in batch)
        texts = {outcome.task_id: text for outcome, text in batch}
        own = {
            task_id for task_id, text in zip(asked, stored, strict=True) if text == texts[task_id]
        }
        return [task_id for task_id in refused if task_id not in own]

    def _read(self, task_id: str, text: bytes) -> Outcome:
        try:
            return _decode(text)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise DecodeError(f"{self._keys.result(task_id)} holds no outcome: {error}") from error


def _published(finals: Sequence[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """Return the ids of final outcomes as a JSON list, and the outcomes as one.

    The second is ``b""`` where only the ids are to be published.
    """
    ids = _encode([task_id for task_id, _ in finals])
    if len(finals) > _PUBLISHED or sum(len(text) for _, text in finals) > _PUBLISHED_BYTES:
        return ids, b""
    return ids, b"[%b]" % b",".join(text for _, text in finals)
