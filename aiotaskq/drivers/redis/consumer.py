"""One incarnation of a worker at the Redis broker: it fetches and settles under a lease.

Theory of operation
-------------------

A consumer is new, open, then closed or given up. It never goes back: a worker makes another one.
It is given up on the server (see `lua/reclaim.lua`), and learns of it when a script returns
false.

A receipt is a number that the consumer itself counts up, together with `receipt_owner`. It is
also the field under which the item lies in the hash ``held:<consumer>``. For each number that the
consumer has used, the client knows one of these states:

* unanswered: `_unanswered` or above, in a fetch whose reply has not arrived;
* held: in `_held`; the delivery is in `_fetched` or was returned by `fetch`;
* being settled: in `_settling`;
* uncertain: in `_uncertain`, with the kind of settlement, as the call failed or its reply was lost;
* finished: in none of these.

Between any two steps the connection may break, the call may be cancelled, the server may be
replaced by a replica that lacks the last writes, or another process may end the lease. Therefore:

* A fetch is noted as unanswered before it is sent, and the note is removed with its reply. The
  next fetch names the first unanswered number, and the server returns the items again that were
  taken from there on. So no item is held by a consumer that does not know of it. See
  `lua/fetch.lua`.
* The deliveries that a cancelled `fetch` had received stay in `_fetched`, for the next call.
* A settlement is done at most once, since its receipt number is removed from the hash in the same
  step. If a repeated settlement finds that the number is gone, and it is uncertain in the same
  kind, then the earlier call has done it. While the lease runs nobody else can have. If the lease
  is lost, all deliveries are reported as no longer held.
* After a reconnect (`connects` has changed) the server may still hold items that were settled.
  They are given back: see `_release_forgotten`. Held, uncertain and unanswered items, and those
  that are being settled, are not touched.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from aiotaskq.contract.message import Delivery
from aiotaskq.contract.records import Grant, News
from aiotaskq.contract.settlement import Again, Dead, Done, Release, Settlement
from aiotaskq.drivers.common.batches import portions, slices
from aiotaskq.drivers.common.deliveries import hand_out, next_is_suspect
from aiotaskq.drivers.common.unstorable import UnstorableValue
from aiotaskq.drivers.redis import items, scripts
from aiotaskq.drivers.redis.client import MAX_BYTES, MAX_ENTRIES, RedisClient
from aiotaskq.drivers.redis.connection import Word
from aiotaskq.drivers.redis.notify import LONGEST_WAIT, RedisNotifier
from aiotaskq.errors import BatchRefused, LeaseLost, Unavailable

_RECEIPT = re.compile(rb"0|[1-9][0-9]{0,14}")  # as `receipts_of` in shared.lua takes them

Only: TypeAlias = Literal["", "suspects", "others"]


class RedisConsumer:
    """Fetches and settles under a lease.

    Args:
        client: The client of the broker.
        queues: The queues, in the order in which they are to be drained.
        identity: The consumer's id, never used again.
        lease: The length of the lease in seconds.
        about: The description of the consumer that the server keeps.
        introduce: Adds queues to the set of all queues, before anything is stored in them.

    Attributes:
        id: The consumer's id.
        receipt_owner: The first part of the receipts of this consumer, and of no other one.
        grant: The name of the lease.
        notifier: Waits for tokens.
        is_open: Whether the lease began, and was not ended by `close`.
    """

    def __init__(
        self,
        client: RedisClient,
        queues: Sequence[str],
        *,
        identity: str,
        lease: float,
        about: bytes,
        introduce: Callable[[Collection[str]], Awaitable[None]],
    ) -> None:
        self.id = identity
        self._client = client
        self._queues = list(queues)
        self._bases = [client.keys.base(queue) for queue in queues]
        self._keys = [*self._bases, client.keys.cancelled]
        self.receipt_owner = f"{self._bases[0]}{identity}"
        self._numbers = {queue: number for number, queue in enumerate(queues, 1)}
        self._about = about
        self._introduce = introduce
        self.notifier = RedisNotifier(client, self._bases, identity)
        self._fetching = asyncio.Lock()  # one `fetch` at a time
        self._fetched: deque[Delivery] = deque()  # received, not yet returned by `fetch`
        self._next_number = 0  # the next receipt number
        self._unanswered: int | None = None  # the first receipt number of unanswered fetches
        self._held: set[int] = set()  # receipt numbers
        self._uncertain: dict[int, type[Settlement]] = {}
        self._settling: set[int] = set()
        self._connects = 0  # of the connection, when the server's held items were last compared
        self._cancelled_until = 0.0  # the time of the last cancelling that is known here
        self.grant = Grant(self.id, tuple(queues), lease)
        self.is_open = False

    async def open(self) -> None:
        if self.is_open:
            return
        await self._introduce(self._queues)
        args: list[Word] = [
            self._client.time_shift,
            self.id,
            self.grant.seconds,
            self._about,
        ]
        now = await self._script(scripts.OPEN, self._bases, args)
        self._cancelled_until = float(now)
        self._connects = self._client.connection.connects
        self.is_open = True

    async def fetch(
        self, limit: int, wait: float, *, order: Sequence[str] | None = None
    ) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        numbers = () if order is None else [self._numbers[queue] for queue in order]
        async with self._fetching:
            while True:
                got, pause = await self.take(limit, numbers)
                if got:
                    return got
                left = until - loop.time()
                if left <= 0.0:
                    return []
                if pause < min(left, LONGEST_WAIT):
                    await self.notifier.wait_exactly(pause)
                else:
                    await self.notifier.wait(min(pause, left))

    async def take(
        self, limit: int, order: Sequence[int] = (), *, only: Only = ""
    ) -> tuple[Sequence[Delivery], float]:
        """Fetch without waiting; return deliveries, and seconds after which there may be more.

        Args:
            limit: The most to take; at least 1.
            order: The numbers of the queues, 1 being the first; empty: as the consumer names them.
            only: The items to take. A worker with several consumers has to say so: one of them
                alone cannot tell whether the worker holds anything.
        """
        pause = 0.0
        if self._connects != self._client.connection.connects:  # checked here to save a call
            await self._release_forgotten()
        fetched = self._fetched
        while pause == 0.0 and len(fetched) < limit and not next_is_suspect(fetched):
            most = min(limit - len(fetched), MAX_ENTRIES)
            pause = await self._fetch(most, order, only=only)
        return hand_out(fetched, limit), pause

    async def peek(self) -> tuple[bool, bool, float]:
        """Return whether suspects wait, whether others do, and seconds until an item falls due."""
        await self._release_forgotten()
        args: list[Word] = [self._client.time_shift, self.id]
        reply = await self._script(scripts.PEEK, self._bases, args)
        if reply is None:
            raise self._lease_lost()
        suspects, more, due, now = reply
        wait = max(0.0, float(due) - float(now)) if due else LONGEST_WAIT
        return bool(suspects), bool(more) or wait == 0.0, wait

    @property
    def holds(self) -> bool:
        """Return whether there are deliveries that were not settled."""
        return bool(self._held)

    @property
    def has_unreturned(self) -> bool:
        """Return whether items were taken that no caller got: cancelled, or without a reply."""
        return self._unanswered is not None or bool(self._fetched)

    async def recover(self) -> Sequence[Delivery]:
        """Return the items that an earlier call took and no caller got, and no others."""
        if self._unanswered is not None:
            await self._fetch(0, (), only="others")
        got, self._fetched = self._fetched, deque()
        return got

    async def return_token(self) -> None:
        """Wake another consumer if there are items, in place of one whose token was taken here."""
        await self._fetch(0, (), only="others")

    async def settle(self, batch: Sequence[Settlement]) -> Sequence[Delivery]:
        by_queue: dict[str, list[Settlement]] = {}
        gone: list[Settlement] = []
        for settlement in batch:
            delivery = settlement.delivery
            if delivery.receipt[0] == self.receipt_owner:
                by_queue.setdefault(delivery.queue, []).append(settlement)
            else:
                gone.append(settlement)
        numbers = {one.delivery.receipt[1] for share in by_queue.values() for one in share}
        self._settling |= numbers
        refused: dict[int, Exception] = {}  # by identity
        try:
            for queue, share in by_queue.items():
                gone += await self._settle(queue, share, refused)
        except BaseException:  # any part may have taken effect
            for share in by_queue.values():
                self.mark_uncertain(share)
            raise
        finally:
            self._settling -= numbers
        which = set(map(id, gone))
        answer = [settlement.delivery for settlement in batch if id(settlement) in which]
        if refused:
            errors = {
                place: refused[id(one)] for place, one in enumerate(batch) if id(one) in refused
            }
            raise BatchRefused(errors, answer=answer)
        return answer

    async def _settle_singly(
        self, queue: str, share: Sequence[Settlement], refused: dict[int, Exception]
    ) -> list[Settlement]:
        """Settle each by itself; note those that can never be settled, by their identity."""
        gone: list[Settlement] = []
        for one in share:
            try:
                gone += await self._settle_any(queue, [one])
            except (UnstorableValue, UnicodeEncodeError) as error:
                refused[id(one)] = items.unstorable(error)
                self._held.add(one.delivery.receipt[1])
        return gone

    def mark_uncertain(self, batch: Sequence[Settlement]) -> None:
        """Note settlements that may have taken effect, though the caller was not told."""
        self._uncertain.update((one.delivery.receipt[1], type(one)) for one in batch)

    async def news(self) -> News:
        args: list[Word] = [self.id, f"{self._cancelled_until:.6f}"]
        reply = await self._script(scripts.NEWS, self._keys, args)
        if reply is None:
            raise self._lease_lost()
        suspects, cancelled = reply
        # Each cancelling has a time of its own, greater than those before.
        if cancelled:
            self._cancelled_until = float(cancelled[-1])
        ids = {items.unpack_id(name) for name in cancelled[::2]}
        return News(cancelled=ids, suspects=bool(suspects))

    async def close(self) -> None:
        was_open, self.is_open = self.is_open, False
        await self.disconnect()
        if not was_open:
            return
        try:
            await self._script(scripts.CLOSE, self._keys, [self.id])
        except Unavailable:
            return  # the lease lapses by itself

    async def disconnect(self) -> None:
        """Close the connection of the notifier; the lease goes on."""
        await self.notifier.close()

    async def _script(
        self, script: scripts.RedisScript, keys: Sequence[Word], args: Sequence[Word]
    ) -> Any:
        return await self._client.connection.script(script, keys, args)

    def _lease_lost(self) -> LeaseLost:
        return LeaseLost(f"{self.id} was given up for dead")

    # --- fetching -------------------------------------------------------------------------------

    async def _fetch(self, limit: int, order: Sequence[int], *, only: Only) -> float:
        """Fetch into `_fetched`; return the seconds until there may be more, 0 for now.

        Args:
            limit: The most to take, up to `MAX_ENTRIES`.
            order: As of `take`.
            only: As of `take`.
        """
        first, unanswered = self._next_number, self._unanswered
        self._next_number += limit
        self._unanswered = first if unanswered is None else unanswered
        args: list[Word] = [
            self._client.time_shift,
            self.id,
            limit,
            first,
            "" if unanswered is None else unanswered,
            only,
            *order,
        ]
        reply = await self._script(scripts.FETCH, self._keys, args)
        self._unanswered = None
        if reply is None:
            raise self._lease_lost()
        wait, unfinished, runs, now = reply
        before = len(self._fetched)
        for queue, number, *packed in runs:
            self._unpack(self._queues[queue - 1], number, packed, float(now))
        if unfinished or len(self._fetched) - before == MAX_ENTRIES:
            return 0.0  # one call takes no more than that, and there may be more
        return min(LONGEST_WAIT, float(wait)) if wait else LONGEST_WAIT

    def _unpack(self, queue: str, number: int, packed: list[bytes], now: float) -> None:
        owner, unpack = self.receipt_owner, items.unpack
        self._fetched.extend(
            [unpack(item, queue, (owner, at), now) for at, item in enumerate(packed, number)]
        )
        self._held.update(range(number, number + len(packed)))

    async def _release_forgotten(self) -> None:
        """Give back items that the server holds for this consumer, though it has settled them.

        A server that took another's place, or lost its last seconds, may have forgotten the
        settlements. It would hold the items for as long as the consumer lives.
        """
        connection = self._client.connection
        connects = connection.connects
        if self._connects not in (0, connects):
            # A settlement that is under way may reach the new server later than this.
            ours = self._held | self._settling | self._uncertain.keys()
            first = self._next_number if self._unanswered is None else self._unanswered
            for base in self._bases:
                held = await connection.command("HKEYS", f"{base}held:{self.id}")
                numbers = {int(field) for field in held if _RECEIPT.fullmatch(field)}
                forgotten = sorted({number for number in numbers if number < first} - ours)
                for part in slices(forgotten, MAX_ENTRIES):
                    args: list[Word] = [self._client.time_shift, self.id]
                    for number in reversed(part):
                        args += (b"r", number)
                    await self._script(scripts.SETTLE, [self._keys[-1], base], args)
        self._connects = connects

    # --- settling -------------------------------------------------------------------------------

    async def _settle(
        self, queue: str, share: list[Settlement], refused: dict[int, Exception]
    ) -> list[Settlement]:
        if all(type(settlement) is Done for settlement in share):
            numbers = {settlement.delivery.receipt[1] for settlement in share}
            # The fast script returns a number only. That is enough where all are held, as far as is
            # known here; otherwise the slower script returns the numbers that are not held.
            if len(numbers) == len(share) and numbers <= self._held:
                return await self._settle_done(queue, share)
        gone: list[Settlement] = []
        # Each released item goes to the head of its list, so the oldest has to be the last.
        ordered = sorted(share, key=_order)
        sizes = [_size(settlement) for settlement in ordered]
        for part in portions(ordered, sizes, most=MAX_ENTRIES, most_bytes=MAX_BYTES):
            try:
                gone += await self._settle_any(queue, part)
            except (UnstorableValue, UnicodeEncodeError):  # the script did not run
                gone += await self._settle_singly(queue, part, refused)
        return gone

    async def _settle_done(self, queue: str, share: list[Settlement]) -> list[Settlement]:
        base = self._client.keys.base(queue)
        gone: list[Settlement] = []
        for part in slices(share, MAX_ENTRIES):
            numbers: list[int] = [settlement.delivery.receipt[1] for settlement in part]
            self._held.difference_update(numbers)
            count = await self._script(scripts.DONE, [base], [self.id, *numbers])
            if count != len(part):  # the lease is lost, or the server lost its data
                gone += part
        return gone

    async def _settle_any(self, queue: str, part: Sequence[Settlement]) -> Sequence[Settlement]:
        keys = [self._client.keys.cancelled, self._client.keys.base(queue)]
        args: list[Word] = [self._client.time_shift, self.id]
        for settlement in part:
            args += self._words(settlement, keys)
        await self._introduce({one.envelope.queue for one in part if isinstance(one, Again)})
        self._held.difference_update(one.delivery.receipt[1] for one in part)
        reply = await self._script(scripts.SETTLE, keys, args)
        settled_before = self._resolve_uncertain(part) if self._uncertain else ()
        if reply is None:
            return part
        left = Counter(map(int, reply))
        # An earlier call settled them, and its reply was lost: nobody else can have.
        left.subtract([number for number in settled_before if left[number]])
        gone: list[Settlement] = []
        # A receipt that is settled twice in one batch is gone the second time only.
        for settlement in reversed(part):
            number = settlement.delivery.receipt[1]
            if left[number]:
                left[number] -= 1
                gone.append(settlement)
        return gone

    def _resolve_uncertain(self, part: Sequence[Settlement]) -> Iterable[int]:
        """Forget that settlements are uncertain, because the server has answered.

        Returns:
            The receipt numbers that an earlier call may have settled in the same way.
        """
        earlier = {one.delivery.receipt[1]: type(one) for one in part}.items() & (
            self._uncertain.items()
        )
        for settlement in part:
            self._uncertain.pop(settlement.delivery.receipt[1], None)
        return [number for number, _ in earlier]

    def _words(self, settlement: Settlement, keys: list[str]) -> tuple[Word, ...]:
        """Return a settlement as `settle.lua` takes it; add the queue that it goes to to `keys`."""
        number: int = settlement.delivery.receipt[1]
        match settlement:
            case Done():
                return b"d", number
            case Again(envelope=envelope):
                base = self._client.keys.base(envelope.queue)
                if base not in keys:
                    keys.append(base)
                due, item = items.pack_with_due(envelope, self._client.serials)
                return b"a", number, keys.index(base) + 1, due, item
            case Dead(reason=reason, details=details):
                reason = reason.encode(errors="backslashreplace").decode()
                return b"x", number, msgspec.json.encode(reason), details
            case Release():
                return b"r", number


def _order(settlement: Settlement) -> tuple[bool, int]:
    if type(settlement) is Release:
        return True, -settlement.delivery.receipt[1]
    return False, 0


def _size(settlement: Settlement) -> int:
    match settlement:
        case Again(envelope=envelope):
            return len(envelope.body)
        case Dead(details=details):
            return len(details)
    return 0
