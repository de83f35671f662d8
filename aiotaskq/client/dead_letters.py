"""The dead letters of an application: listed, sent back to their queues, dropped.

Letters are read page by page, the newest first, so that there may be any number of them. Several
callers may do the same at once: each letter is retried or dropped by one of them. Nothing that
stands in a letter is trusted: it may be a message of anybody.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import TypedDict, Unpack

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Attempt, Envelope, Message
from aiotaskq.contract.outcome import TaskStatus
from aiotaskq.contract.records import DeadLetter, DeathDetails
from aiotaskq.contract.results import ResultBackend
from aiotaskq.encoding.codec import Codec, decode_plain, encode_json
from aiotaskq.errors import BatchRefused, CodecError, ConfigError, DecodeError
from aiotaskq.tasks.application import Application

_FAR = 6e10  # seconds: two thousand years; within them, time zones do not leave the calendar
_PAGE = 50  # letters read at once; each may be as large as a message may be

# It accepts every serializer and unpickles nothing: pickled arguments remain bytes.
# Letters that are too large for a worker are read as well: people decide about them.
_codec = Codec(accept=("json", "msgpack", "pickle"), max_payload=2**40)


class Which(TypedDict, total=False):
    """A choice of dead letters: those that meet all the conditions given."""

    queue: str | None
    """The name of their queue; without it, all queues."""
    id: str | Collection[str] | None
    """The id of the task, or several of them."""
    key: str | Collection[str] | None
    """The key of a letter, or several of them. The same key may be in use in two queues."""
    task: str | None
    """The name of the task, or a pattern such as ``"billing.*"``."""
    reason: str | None
    """A part of the reason, in upper or lower case."""


class DeadTask(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter: a task that could not end well, with the reason.

    Attributes:
        id: The id of the task; empty where the message is not one of this package.
        key: The key of this letter in its queue.
        queue: The queue that it came from, and to which a retry sends it.
        task: The name of the task; empty where the message cannot be read.
        reason: The reason, in words.
        crashes: The number of workers that crashed while they held it.
        crash_note: How the last of them crashed, in words.
        died_at: The time at which it became a dead letter, in UTC.
        worker: The name of the worker that buried it.
        attempts: Its known runs, with time, worker and error; of many, the latest.
        payload: The message, as it was sent.
    """

    id: str
    key: str
    queue: str
    task: str
    reason: str
    crashes: int
    crash_note: str
    died_at: datetime
    worker: str
    attempts: tuple[Attempt, ...]
    payload: bytes

    @property
    def args(self) -> str:
        """The positional arguments as JSON; empty where the message cannot be read."""
        message = _message(self.payload)
        if message is None:
            return ""
        if message.pickled is not None:
            return f"pickled, {len(message.pickled):,} bytes"
        return _text(message.args) or "[]"

    @property
    def kwargs(self) -> str:
        """The keyword arguments as JSON; empty where they are pickled or cannot be read."""
        message = _message(self.payload)
        if message is None or message.pickled is not None:
            return ""
        return _text(message.kwargs) or "{}"


class DeadLetters:
    """The dead letters of an application, as `TaskQueue.dead`.

    Each method takes the conditions of `Which`. Letters that are added meanwhile are left alone.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def list(self, *, limit: int | None = 100, **which: Unpack[Which]) -> Sequence[DeadTask]:
        """Return dead letters, the newest of each queue first.

        Args:
            limit: The most to return, each with its payload; None: however many there are.
            which: Which of them; without a word, all.
        """
        chosen = _Chosen(which)
        return [read(letter) async for page in self._pages(chosen, limit) for letter in page]

    async def count(self, **which: Unpack[Which]) -> int:
        """Return how many dead letters there are; see `Which`."""
        chosen = _Chosen(which)
        if not chosen.looks_inside:
            depths = await (await self._app.broker()).depth()
            return sum(
                depths[queue].dead for queue in depths if queue == chosen.queue or not chosen.queue
            )
        return sum([len(page) async for page in self._pages(chosen, None)])

    async def retry(
        self, *, everything: bool = False, limit: int | None = None, **which: Unpack[Which]
    ) -> int:
        """Run tasks again, each under its own id, beginning with its first attempt.

        The stored failure of such a task is deleted, so that callers wait for its new result. Its
        earlier attempts stay in its history. An expiry that has passed is removed. A message that
        cannot be read goes back unchanged.

        Args:
            everything: Whether all dead letters are meant, in place of conditions.
            limit: The most letters to retry, the newest first.
            which: The conditions.

        Returns:
            The number of letters that went back to their queues.

        Raises:
            ConfigError: Neither conditions nor `everything` are given.
            BatchRefused: These letters can never go back and are still there; the others went.
                `answer` has their number.
            Unavailable: A server is away; the letters that were not retried are still there.
        """
        chosen = _Chosen(which, everything=everything)
        broker, backend = await self._app.broker(), await self._app.backend()
        count = 0
        refused: dict[int, Exception] = {}  # by the position among all that were chosen
        seen = 0
        async for page in self._pages(chosen, limit):
            # The failure goes first: the first final outcome of an id stays, so the new run could
            # not store its own. After a crash between the two steps the letter is still there to be
            # retried; in the other order, the task would run for nothing.
            if backend is not None:
                await _forget_failures(backend, page)
            # The oldest first, as they were sent.
            letters = [(letter.key, renewed(letter)) for letter in reversed(page)]
            try:
                missing = await broker.revive(page[0].queue, letters)
            except BatchRefused as error:
                missing = error.answer
                last = seen + len(page) - 1
                refused |= {last - at: why for at, why in error.errors.items()}
                count -= len(error.errors)
            count += len(page) - len(missing)
            seen += len(page)
        if refused:
            raise BatchRefused(refused, answer=count)
        return count

    async def discard(
        self, *, everything: bool = False, limit: int | None = None, **which: Unpack[Which]
    ) -> int:
        """Drop dead letters. This cannot be undone; the stored failures of the tasks stay.

        Args:
            everything: Whether all dead letters are meant, in place of conditions.
            limit: The most letters to drop, the newest first.
            which: The conditions.

        Returns:
            The number of letters that were dropped.

        Raises:
            ConfigError: Neither conditions nor `everything` are given.
            BrokerUnavailable: The broker is away; those that were not dropped are still there.
        """
        chosen = _Chosen(which, everything=everything)
        broker = await self._app.broker()
        count = 0
        async for page in self._pages(chosen, limit):
            count += await broker.discard(page[0].queue, [letter.key for letter in page])
        return count

    async def _pages(
        self, chosen: _Chosen, limit: int | None
    ) -> AsyncIterator[Sequence[DeadLetter]]:
        """Yield the chosen letters, those of one queue at a time; no page is empty."""
        if limit is not None and limit < 1:
            raise ConfigError(f"limit is {limit}; it must be 1 or more")
        left = limit
        broker = await self._app.broker()
        for queue in [chosen.queue] if chosen.queue else await _queues(broker):
            before: str | None = None
            while letters := await broker.dead(queue, chosen.page(left), before=before):
                meant = [letter for letter in letters if chosen.means(letter)][:left]
                if meant:
                    yield meant
                left = None if left is None else left - len(meant)
                if left == 0:
                    return
                before = letters[-1].key


async def _forget_failures(backend: ResultBackend, page: Sequence[DeadLetter]) -> None:
    ids = [letter.id for letter in page if letter.id]
    try:
        outcomes = await backend.load(ids)
    except DecodeError:  # another program wrote one of them, and the others are to be read
        await _forget_failures_singly(backend, ids)
        return
    # A task that has succeeded has a result: another caller may have retried it just now.
    failed = [of for of, one in outcomes.items() if one.status is not TaskStatus.SUCCESS]
    if failed:
        await backend.forget(failed)


async def _forget_failures_singly(backend: ResultBackend, ids: Sequence[str]) -> None:
    for task_id in ids:
        try:
            outcome = (await backend.load([task_id])).get(task_id)
        except DecodeError:
            succeeded = False
        else:
            succeeded = outcome is None or outcome.status is TaskStatus.SUCCESS
        if not succeeded:
            await backend.forget([task_id])


async def _queues(broker: Broker) -> Sequence[str]:
    return sorted(queue for queue, depth in (await broker.depth()).items() if depth.dead)


class _Chosen:
    """A checked choice of letters.

    Args:
        which: The conditions.
        everything: Whether all letters are meant; None: no conditions mean all letters.
    """

    def __init__(self, which: Which, *, everything: bool | None = None) -> None:
        unknown = which.keys() - Which.__annotations__.keys()
        if unknown:  # it would narrow nothing down, and so hit more than was meant
            known = ", ".join(f"{name}=" for name in Which.__annotations__)
            raise ConfigError(f"there is no {min(unknown)}= of dead letters; there are {known}")
        self.queue = which.get("queue")
        self._ids = _several("id", which.get("id"))
        self._keys = _several("key", which.get("key"))
        self._task = which.get("task")
        self._reason = (which.get("reason") or "").casefold()
        self.looks_inside = any(
            one is not None for one in (self._ids, self._keys, self._task)
        ) or bool(self._reason)
        said = self.looks_inside or bool(self.queue)
        if everything is False and not said:
            raise ConfigError(
                "which dead letters? Say id=, key=, task=, reason= or queue=, or everything=True"
            )
        if everything and said:
            raise ConfigError("everything=True means all dead letters: leave the other words out")

    def page(self, left: int | None) -> int:
        """Return the number of letters to read at once, where `left` more are wanted."""
        return _PAGE if left is None or self.looks_inside else min(_PAGE, left)

    def means(self, letter: DeadLetter) -> bool:
        """Return whether a letter meets the conditions."""
        return (
            (self._ids is None or letter.id in self._ids)
            and (self._keys is None or letter.key in self._keys)
            and self._reason in letter.reason.casefold()
            and (self._task is None or _fits(_task_of(letter), self._task))
        )


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _several(name: str, given: str | Collection[str] | None) -> frozenset[str] | None:
    if given is None:
        return None
    several = frozenset([given] if isinstance(given, str) else given)
    if not several:
        raise ConfigError(f"{name}= names none: leave it out, or give at least one")
    return several


def read(letter: DeadLetter) -> DeadTask:
    """Return a dead letter with its details and message decoded."""
    details, message = _details(letter), None
    if not details.task:  # written by somebody else, or not to be read
        message = _message(letter.body)
    return DeadTask(
        id=letter.id,
        key=letter.key,
        queue=letter.queue,
        task=details.task if message is None else message.task,
        reason=letter.reason,
        crashes=letter.crashes,
        crash_note=details.crash_note,
        died_at=moment(letter.died_at),
        worker=details.worker,
        attempts=details.attempts if message is None else message.history,
        payload=letter.body,
    )


def renewed(letter: DeadLetter) -> Envelope:
    """Return the envelope that runs a dead task again, beginning with its first attempt."""
    message = _message(letter.body)
    if message is None:
        return Envelope(id=letter.id, queue=letter.queue, body=letter.body)
    expires_at = message.expires_at
    if expires_at is not None and expires_at <= time.time():
        expires_at = None  # a caller that retries the task wants it to run
    fresh = replace(
        message,
        attempt=1,
        history=_details(letter).attempts or message.history,
        unknown_for=0.0,
        expires_at=expires_at,
    )
    return Envelope(
        id=letter.id,
        queue=letter.queue,
        body=_codec.encode_again(fresh, letter.body),
        priority=message.priority,
        expires_at=expires_at,
    )


def moment(at: float) -> datetime:
    """Return a Unix time that anybody may have written; the epoch for one far off the present."""
    return datetime.fromtimestamp(at if -_FAR < at < _FAR else 0.0, UTC)


def _task_of(letter: DeadLetter) -> str:
    return _details(letter).task or read(letter).task


def _details(letter: DeadLetter) -> DeathDetails:
    try:
        return msgspec.json.decode(letter.details or b"{}", type=DeathDetails)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return DeathDetails()  # not written by a worker of this package


def _message(body: bytes) -> Message | None:
    try:
        return _codec.decode_message(body)
    except DecodeError:
        return None  # its reason says already that it cannot be read


def _text(raw: Raw) -> str:
    encoded = bytes(raw)
    if encoded[:1] in (b"", b"[", b"{"):
        return encoded.decode(errors="replace")
    try:
        value = decode_plain(encoded, json=False)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    try:
        return encode_json(value).decode()
    except CodecError:  # MessagePack has keys that JSON has not
        return repr(value)
