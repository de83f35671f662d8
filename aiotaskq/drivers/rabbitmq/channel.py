"""Channels: AMQP 0-9-1 as it is spoken on one of them.

The connection is aiormq's, on which aio-pika is built, and so is the reading of frames; pamqp,
which comes with it, says how they look as bytes. aiormq's own `Channel` is not used: it makes a
task for each delivery, sends the next question only when the last one is answered, knows returned
messages by nothing but a message id, and closes itself when a call is cancelled. This one asks many
things at once, publishes in batches, and hands out deliveries in the reader.

Commands of a channel go out in the order in which they were given, and replies come in that order,
but for those of consuming.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

from pamqp import commands, constants, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

_OVERHEAD = constants.FRAME_HEADER_SIZE + len(constants.FRAME_END_CHAR)  # bytes of a frame
_INDEX_SIZE = 4  # bytes, with which a method begins
# What brings content along: a header, and perhaps bodies.
_CARRIERS = (commands.Basic.Deliver, commands.Basic.GetOk, commands.Basic.Return)
_CLOSE = commands.Channel.Close(200, "", 0, 0)


class Connection(Protocol):
    """What a channel needs of its connection."""

    loop: asyncio.AbstractEventLoop
    patience: float
    frame_max: int

    def write(self, data: bytes) -> None:
        """Send bytes, which must be whole frames."""
        ...

    def fail(self, error: Exception) -> None:
        """Give the connection up."""
        ...


class Disconnected(Exception):
    """The connection is gone, or a channel that was closed for good."""


class Silent(Disconnected):
    """The server did not answer in time."""


class Refused(Exception):
    """The server refused what was asked, and closed the channel, or the connection.

    Attributes:
        code: As AMQP has it: 404 for what is not there, 406 for what is there and differs.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Content(NamedTuple):
    """A message as it came: handed out, fetched or returned."""

    method: Any  # Deliver, GetOk or Return
    properties: Any  # Basic.Properties, which pamqp gives odder types than it reads
    body: bytes


class Publication(NamedTuple):
    """A message to be published, as bytes but for its channel."""

    exchange: str
    routing_key: str
    properties: bytes  # a content header without the size, as `pack` makes it
    body: bytes


class Confirmation:
    """What becomes of a batch that was published.

    Attributes:
        done: Done when all of it was confirmed, refused or returned, or the channel is gone.
        returned: Routing keys that led nowhere.
        refused: What the server did not take.
        largest: Bytes of the largest body.
    """

    def __init__(self, batch: Sequence[Publication], loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.returned: set[str] = set()
        self.refused: list[Publication] = []
        self.largest = max((len(one.body) for one in batch), default=0)
        self._taken: set[int] = set()  # ids of publications, which the sender keeps
        self._keys = {one.routing_key for one in batch}
        self._left = len(batch)

    def note(self, one: Publication, *, taken: bool) -> None:
        """Note that one was confirmed, or refused."""
        self._left -= 1
        if taken:
            self._taken.add(id(one))
        else:
            self.refused.append(one)
        if not self._left and not self.done.done():
            self.done.set_result(None)

    def has_safe(self, one: Publication) -> bool:
        """Whether the server has one of the batch safe by now, whatever becomes of the others."""
        return id(one) in self._taken and one.routing_key not in self.returned

    def note_returned(self, routing_key: str) -> None:
        """Note that one came back, as its routing key leads nowhere."""
        if routing_key in self._keys:
            self.returned.add(routing_key)


def pack(properties: commands.Basic.Properties) -> bytes:
    """Return properties as a `Publication` has them."""
    return properties.marshal()


class _Packed:
    """Properties that are bytes, for pamqp to put into a header."""

    __slots__ = ("_bytes",)

    def __init__(self, packed: bytes) -> None:
        self._bytes = packed

    def marshal(self) -> bytes:
        return self._bytes


class _Intake:
    """Where aiormq's reader puts what comes for a channel; it is taken in at once."""

    def __init__(self, receive: Callable[[Any], None]) -> None:
        self._receive = receive

    async def put(self, item: tuple[int, Any]) -> None:
        """Take in a frame; its size in bytes, which comes with it, is nothing to us."""
        self._receive(item[1])


class Channel:
    """A channel that is open. It dies of the first refusal, with all that waits on it.

    Attributes:
        error: Why it is dead; None while it lives.
        frames: Where aiormq puts what comes.
        on_cancelled: Called with a consumer's tag when the server ends it, as its queue is gone.
        on_failed: Called when it dies.
    """

    def __init__(self, wire: Connection, number: int) -> None:
        self._wire = wire
        self._number = number
        self.frames = _Intake(self.receive)
        self._replies: deque[asyncio.Future[Any]] = deque()
        # Those of `Basic.Consume`, apart: for a quorum queue RabbitMQ sends them later than the
        # replies of what was asked after it.
        self._consume_replies: deque[asyncio.Future[Any]] = deque()
        self._consumers: dict[str, Callable[[Content], None]] = {}
        self._unconfirmed: dict[int, tuple[Confirmation, Publication]] = {}
        self._published = 0
        self._carrier: Any = None  # the method whose content is coming
        self._properties: Any = None
        self._size = 0
        self._bodies: list[bytes] = []
        self.error: Exception | None = None
        self.on_cancelled: Callable[[str], None] = lambda _: None
        self.on_failed: Callable[[], None] = lambda: None

    # --- asking ---------------------------------------------------------------------------------

    async def call(self, *methods: Frame) -> list[Any]:
        """Send methods that each have a reply; return the replies.

        Raises:
            Refused: The server refuses one, and the channel is gone.
            Disconnected: There was no answer.
        """
        return await self.send(self.pack(*methods), len(methods))

    async def send(self, packed: bytes, count: int) -> list[Any]:
        """Send methods that are packed already, and return their replies, which are as many."""
        futures = self.start(packed, count)
        wire = self._wire
        try:
            async with asyncio.timeout(wire.patience):
                return [await future for future in futures]
        except TimeoutError:
            wire.fail(Silent("no answer in time"))
            raise Silent("no answer in time") from None
        finally:
            for future in futures:  # what is not asked for any more
                future.cancel()

    def start(self, packed: bytes, count: int) -> list[asyncio.Future[Any]]:
        """Send methods that are packed already; return the futures of their replies."""
        if self.error is not None:
            raise self._why()
        futures = [self._wire.loop.create_future() for _ in range(count)]
        for future, index in zip(futures, _indexes(packed), strict=True):
            late = index == commands.Basic.Consume.index
            (self._consume_replies if late else self._replies).append(future)
        self._wire.write(packed)
        return futures

    def pack(self, *methods: Frame) -> bytes:
        """Return methods as bytes for `send`, `start` or `tell`."""
        return b"".join(frame.marshal(one, self._number) for one in methods)

    def tell(self, packed: bytes) -> None:
        """Send methods that have no reply."""
        if self.error is not None:
            raise self._why()
        self._wire.write(packed)

    def listen(self, consumer_tag: str, receive: Callable[[Content], None]) -> None:
        """Have what comes for a consumer handed to a function, on this event loop."""
        self._consumers[consumer_tag] = receive

    def unlisten(self, consumer_tag: str) -> None:
        """Hear no more of a consumer."""
        self._consumers.pop(consumer_tag, None)

    def ack(self, tags: Collection[int], among: Iterable[int] = ()) -> None:
        """Acknowledge deliveries.

        Args:
            tags: Theirs.
            among: Of all that are held over this channel. Then those from the first on go in one
                word, which a quorum queue has done before the channel can be closed; many single
                ones it may still have to do, and forgets.
        """
        wanted = set(tags)
        first = list(itertools.takewhile(wanted.__contains__, sorted(among)))
        wanted.difference_update(first)
        acks = [commands.Basic.Ack(first[-1], multiple=True)] if first else []
        acks += [commands.Basic.Ack(tag) for tag in wanted]
        self.tell(self.pack(*acks))

    def publish(self, batch: Sequence[Publication]) -> Confirmation:
        """Publish messages on a channel with confirms; each has to lead to a queue."""
        if self.error is not None:
            raise self._why()
        confirmation = Confirmation(batch, self._wire.loop)
        number, most = self._number, self._wire.frame_max - _OVERHEAD
        parts: list[bytes] = []
        for one in batch:
            self._published += 1
            self._unconfirmed[self._published] = confirmation, one
            properties = cast("commands.Basic.Properties", _Packed(one.properties))
            content = ContentHeader(body_size=len(one.body), properties=properties)
            parts.append(_publish(number, one.exchange, one.routing_key))
            parts.append(frame.marshal(content, number))
            for start in range(0, len(one.body), most):
                piece = ContentBody(one.body[start : start + most])
                parts.append(frame.marshal(piece, number))
        self._wire.write(b"".join(parts))
        return confirmation

    async def close(self) -> None:
        """Close it: what it holds goes back to its queues. Never raises."""
        if self.error is None:
            with contextlib.suppress(Disconnected, Refused):  # then it is closed
                await self.call(_CLOSE)
            self.fail(Disconnected("the channel was closed"))

    def abandon(self) -> None:
        """Have it closed, and do not wait for that: nobody uses it any more."""
        if self.error is None:
            self.start(self.pack(_CLOSE), 1)

    # --- what comes -----------------------------------------------------------------------------

    def fail(self, error: Exception) -> None:
        """Give it up."""
        if self.error is not None:
            return
        self.error = error
        self.on_failed()
        for replies in (self._replies, self._consume_replies):
            for future in replies:
                _refuse(future, error)
            replies.clear()
        for confirmation in {confirmation for confirmation, _ in self._unconfirmed.values()}:
            _refuse(confirmation.done, error)
        self._unconfirmed.clear()

    def receive(self, part: Any) -> None:
        """Take in a frame, as pamqp has read it."""
        match part:
            case ContentHeader():
                self._size = part.body_size
                self._properties = part.properties
                if not self._size:
                    self._deliver(b"")
            case ContentBody():
                self._receive_body(part.value)
            case commands.Basic.Ack() | commands.Basic.Nack():
                taken = isinstance(part, commands.Basic.Ack)
                self._confirm(part.delivery_tag or 0, multiple=part.multiple, taken=taken)
            case _ if isinstance(part, _CARRIERS):
                self._carrier = part
            case _:
                self._answer(part)

    def _receive_body(self, payload: bytes) -> None:
        if len(payload) == self._size and not self._bodies:
            self._deliver(payload)
            return
        self._bodies.append(payload)
        if sum(map(len, self._bodies)) == self._size:
            body, self._bodies = b"".join(self._bodies), []
            self._deliver(body)

    def _deliver(self, body: bytes) -> None:
        method, self._carrier = self._carrier, None
        content = Content(method, self._properties, body)
        if isinstance(method, commands.Basic.Deliver):
            receive = self._consumers.get(str(method.consumer_tag))
            if receive is not None:
                receive(content)
        elif isinstance(method, commands.Basic.Return):
            for confirmation in {confirmation for confirmation, _ in self._unconfirmed.values()}:
                confirmation.note_returned(str(method.routing_key))
        else:
            self._reply(content)

    def _answer(self, method: Any) -> None:
        if isinstance(method, commands.Channel.Close):
            self._wire.write(self.pack(commands.Channel.CloseOk()))
            self.fail(Refused(int(method.reply_code or 0), str(method.reply_text)))
        elif isinstance(method, commands.Basic.Cancel):
            self.unlisten(str(method.consumer_tag))
            self.on_cancelled(str(method.consumer_tag))
        elif isinstance(method, commands.Channel.Flow):
            self._wire.write(self.pack(commands.Channel.FlowOk(method.active)))
        else:
            self._reply(method)

    def _reply(self, value: Any) -> None:
        late = isinstance(value, commands.Basic.ConsumeOk)
        replies = self._consume_replies if late else self._replies
        if not replies:
            self._wire.fail(Disconnected("an answer that nobody asked for"))
            return
        future = replies.popleft()
        if not future.done():
            future.set_result(value)

    def _confirm(self, tag: int, *, multiple: bool, taken: bool) -> None:
        confirmed = [tag]
        if multiple:
            # In the order of publishing, so that it ends at the first that comes later.
            confirmed = list(itertools.takewhile(lambda one: one <= tag, self._unconfirmed))
        for number in confirmed:
            found = self._unconfirmed.pop(number, None)
            if found is not None:
                confirmation, one = found
                confirmation.note(one, taken=taken)

    def _why(self) -> Exception:
        error = self.error
        assert error is not None
        # Of its own: one exception that is raised in many tasks would gather their tracebacks.
        return (
            Refused(error.code, str(error))
            if isinstance(error, Refused)
            else Disconnected(str(error))
        )


# Nearly all that is published goes to few queues. To pack it takes as long as all else that is to
# be done here for a message (7 us of 10): it is done once.
@lru_cache(maxsize=1024)
def _publish(number: int, exchange: str, routing_key: str) -> bytes:
    """Pack the method by which a message is published that has to lead to a queue."""
    method = commands.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True)
    return frame.marshal(method, number)


def _indexes(packed: bytes) -> Iterator[int]:
    """Yield the indexes of packed methods."""
    at = 0
    while at < len(packed):
        start = at + constants.FRAME_HEADER_SIZE
        _, _, size = frame.frame_parts(packed[at:start])
        yield int.from_bytes(packed[start : start + _INDEX_SIZE])
        at += (size or 0) + _OVERHEAD


def _refuse(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # or it would be told of as never read, where nobody waits any more
