"""Outcomes in one store: a readable key for each.

A final outcome is `<prefix>:result:<id>`, written once. One that is not final is
`<prefix>:state:<id>`, and goes when a final one comes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from aiotaskq.contract.outcome import Outcome
from aiotaskq.drivers.redis import scripts
from aiotaskq.drivers.redis.client import portions
from aiotaskq.drivers.redis.keys import Keys
from aiotaskq.drivers.redis.link import Link, Word
from aiotaskq.errors import DecodeError

_TOLD = 8  # outcomes that go to the subscribers whole, if they are as few: nothing else is to do
_TOLD_BYTES = 4096  # then, and they take no more than this
_LOADED = 500  # outcomes in one command

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Outcome).decode


class Outcomes:
    """See `aiotaskq.contract.results.ResultBackend`.

    Args:
        link: To the server.
        keys: What its keys are called.
    """

    def __init__(self, link: Link, keys: Keys) -> None:
        self._link = link
        self._keys = keys
        self._unsure: set[str] = set()  # ids whose outcomes were sent, and may have been stored

    async def store(self, batch: Sequence[Outcome], ttl: float | None) -> Collection[str]:
        refused: list[str] = []
        texts = [_encode(outcome) for outcome in batch]
        encoded = list(zip(batch, texts, strict=True))
        try:
            for part in portions(encoded, [len(text) for text in texts]):
                refused += await self._store(part, ttl)
        except BaseException:
            self.doubt(batch)
            raise
        if self._unsure:
            refused = await self._strange(batch, refused)
        return refused

    def doubt(self, batch: Sequence[Outcome]) -> None:
        """Note outcomes that may have been stored, as nobody was told of."""
        self._unsure.update(outcome.task_id for outcome in batch)

    async def load(self, ids: Collection[str]) -> Mapping[str, Outcome]:
        found: dict[str, Outcome] = {}
        wanted = list(ids)
        for start in range(0, len(wanted), _LOADED):
            part = wanted[start : start + _LOADED]
            keys = [key for task_id in part for key in self._keys.outcome(task_id)]
            texts = await self._link.command("MGET", *keys)
            for task_id, result, state in zip(part, texts[::2], texts[1::2], strict=True):
                text = state if result is None else result
                if text is not None:
                    found[task_id] = self._read(task_id, text)
        return found

    async def forget(self, ids: Collection[str]) -> int:
        count = 0
        wanted = list(set(ids))
        for start in range(0, len(wanted), _LOADED):
            part = wanted[start : start + _LOADED]
            # Of each id there is one or the other.
            keys = [key for task_id in part for key in self._keys.outcome(task_id)]
            count += await self._link.command("DEL", *keys)
        return count

    async def _store(self, part: Sequence[tuple[Outcome, bytes]], ttl: float | None) -> list[str]:
        keys, pair = [self._keys.none], self._keys.outcome
        finals: list[tuple[str, bytes]] = []
        words: list[Word] = []
        for outcome, text in part:
            keys += pair(outcome.task_id)
            if outcome.status.final:
                finals.append((outcome.task_id, text))
                words += (b"1", text)
            else:
                words += (b"0", text)
        lasting = "" if ttl is None else max(1, round(ttl * 1000))
        words = [lasting, self._keys.results, *_news(finals), *words]
        refused = await self._link.script(scripts.STORE, keys, words)
        return [part[position - 1][0].task_id for position in refused]

    async def _strange(self, batch: Sequence[Outcome], refused: list[str]) -> list[str]:
        """Return the refused ids but for those whose outcome is there from an earlier call.

        Of that the reply was lost.
        """
        asked = [task_id for task_id in refused if task_id in self._unsure]
        there = await self._link.command("MGET", *map(self._keys.result, asked)) if asked else ()
        self._unsure.difference_update(outcome.task_id for outcome in batch)
        ours = {outcome.task_id: _encode(outcome) for outcome in batch}
        stored = {
            task_id for task_id, text in zip(asked, there, strict=True) if text == ours[task_id]
        }
        return [task_id for task_id in refused if task_id not in stored]

    def _read(self, task_id: str, text: bytes) -> Outcome:
        try:
            return _decode(text)
        except msgspec.MsgspecError as error:
            raise DecodeError(f"{self._keys.result(task_id)} holds no outcome: {error}") from error


def _news(finals: Sequence[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    """Return what the subscribers are told of final outcomes: their ids, and all of them or b""."""
    ids = _encode([task_id for task_id, _ in finals])
    if len(finals) > _TOLD or sum(len(text) for _, text in finals) > _TOLD_BYTES:
        return ids, b""
    return ids, b"[%b]" % b",".join(text for _, text in finals)
