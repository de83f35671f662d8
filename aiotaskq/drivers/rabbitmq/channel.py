"""AMQP 0-9-1 channels: many calls at once, batches of publications, deliveries in the reader.

The connection belongs to aiormq, the core of aio-pika, and so does the reading of frames; pamqp,
which comes with it, packs frames into bytes. aiormq's own `Channel` is not used: it starts a task
for each delivery, sends a call only when the last one is answered, recognizes returned messages by
their message id alone, and closes itself when a call is cancelled.

Theory of operation
-------------------
A channel is open (`error` is None) or failed. It fails once, in `fail`: when the server refuses a
method and closes the channel, when its transport fails, or when it is closed here. At that moment
every reply and every confirmation that is still missing gets the error, so nobody waits for a
channel that cannot answer.

Replies carry no number, they are matched by order. The future of each reply is queued in the same
step in which the call is written, without an await in between. A caller that is cancelled, or runs
out of time, leaves its future in the queue: the server answers all the same, and that answer must
not be taken for the next one. The replies to `Basic.Consume` have a queue of their own, because
RabbitMQ sends them for quorum queues later than the replies of calls that were sent after them.

Publications are numbered in the order in which they are written; confirms name these numbers. A
message that leads to no queue is returned before it is confirmed, and the return names its routing
key only: it is noted in every unfinished confirmation that has the key.

A message arrives in parts: a method, a header, any number of bodies. The parts of one message are
never mixed with those of another one on the same channel, so one place for them is enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from pamqp import commands, constants, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from aiotaskq.drivers.rabbitmq.frames import raw_properties
from aiotaskq.drivers.rabbitmq.properties import AmqpProperties

_OVERHEAD = constants.FRAME_HEADER_SIZE + len(constants.FRAME_END_CHAR)  # bytes of a frame
_METHOD_HEAD = struct.Struct(">3xII")  # the size of a method, and the index that it begins with
_CONTENT_HEAD = struct.Struct(">BHIHxxQ")  # kind, channel, size of the header; class, size of body
_CLASS_AND_SIZE = 12  # bytes of a content header before the properties
_BASIC = commands.Basic.frame_id
_CLOSE = commands.Channel.Close(200, "", 0, 0)


class ChannelTransport(Protocol):
    """The part of a transport that a channel uses."""

    loop: asyncio.AbstractEventLoop
    answer_timeout: float
    frame_max: int

    def write(self, data: bytes) -> None:
        """Send bytes, which must be whole frames."""
        ...

    def fail(self, error: Exception) -> None:
        """Give the connection up."""
        ...


class AmqpError(Exception):
    """A call failed, and with it the channel or the connection."""


class AmqpDisconnected(AmqpError):
    """The connection is gone, or a channel was closed for good."""


class AmqpNoAnswer(AmqpDisconnected):
    """The server did not answer in time."""


class AmqpRefused(AmqpError):
    """The server refused a call, and closed the channel or the connection.

    Attributes:
        code: AMQP's reply code, such as 404 for a missing queue and 406 for one that differs.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@asynccontextmanager
async def time_limit(seconds: float, text: str) -> AsyncIterator[None]:
    """Raise `AmqpNoAnswer` with a text if the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise AmqpNoAnswer(text) from None


class AmqpMessage(NamedTuple):
    """A message as it arrived: delivered, fetched or returned."""

    method: Any  # Deliver, GetOk or Return
    properties: AmqpProperties
    body: bytes


class AmqpPublication(NamedTuple):
    """A message to publish, packed but for the number of its channel."""

    exchange: str
    routing_key: str
    properties: bytes  # `Basic.Properties`, marshalled
    body: bytes


class AmqpConfirmation:
    """The server's answers to one batch of publications.

    Attributes:
        done: Done when each publication was confirmed or refused, or the channel failed.
        returned: Routing keys that led to no queue.
        refused: Publications that the server did not take.
    """

    def __init__(self, batch: Sequence[AmqpPublication], loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.returned: set[str] = set()
        self.refused: list[AmqpPublication] = []
        self._taken: set[int] = set()  # ids of the objects, which the sender keeps alive
        self._keys = {one.routing_key for one in batch}
        self._left = len(batch)

    def note(self, publication: AmqpPublication, *, taken: bool) -> None:
        """Note that a publication was confirmed or refused."""
        self._left -= 1
        if taken:
            self._taken.add(id(publication))
        else:
            self.refused.append(publication)
        if not self._left and not self.done.done():
            self.done.set_result(None)

    def is_stored(self, publication: AmqpPublication) -> bool:
        """Return whether the server has stored this publication, apart from the others."""
        return self.is_taken(publication) and publication.routing_key not in self.returned

    def is_taken(self, publication: AmqpPublication) -> bool:
        """Return whether the server has confirmed this publication, though it led to no queue."""
        return id(publication) in self._taken

    def note_returned(self, routing_key: str) -> None:
        """Note that a publication with this routing key led to no queue."""
        if routing_key in self._keys:
            self.returned.add(routing_key)


class RabbitChannel:
    """An open channel. It fails with the first refusal, and every call on it with it.

    Attributes:
        error: The reason why it failed; None while it is open.
        frames: The queue where aiormq's reader puts frames: the channel itself.
        on_cancelled: Called with a consumer tag when the server ends that consumer, because its
            queue is gone.
        on_failed: Called when the channel fails.
    """

    def __init__(self, transport: ChannelTransport, number: int) -> None:
        self._transport = transport
        self._number = number
        self.frames = self
        self._replies: deque[asyncio.Future[Any]] = deque()
        self._consume_replies: deque[asyncio.Future[Any]] = deque()
        self._consumers: dict[str, Callable[[AmqpMessage], None]] = {}
        self._unconfirmed: dict[int, tuple[AmqpConfirmation, AmqpPublication]] = {}
        self._published = 0
        # The message that is arriving.
        self._carrier: Any = None
        self._properties = b""
        self._size = 0
        self._bodies: list[bytes] = []
        self.error: Exception | None = None
        self.on_cancelled: Callable[[str], None] = lambda _: None
        self.on_failed: Callable[[], None] = lambda: None

    # --- calls ----------------------------------------------------------------------------------

    async def call(self, *methods: Frame) -> list[Any]:
        """Send methods that each have a reply; return the replies.

        Raises:
            AmqpRefused: The server refuses one, and the channel is gone.
            AmqpDisconnected: There was no answer.
        """
        return await self.send(self.pack(*methods))

    async def send(self, packed: bytes) -> list[Any]:
        """Send packed methods that each have a reply; return the replies."""
        futures = self.start(packed)
        transport = self._transport
        try:
            async with asyncio.timeout(transport.answer_timeout):
                return [await future for future in futures]
        except TimeoutError:
            transport.fail(AmqpNoAnswer("no answer in time"))
            raise AmqpNoAnswer("no answer in time") from None
        finally:
            for future in futures:  # nobody waits for the rest any more
                future.cancel()

    def start(self, packed: bytes) -> list[asyncio.Future[Any]]:
        """Send packed methods that each have a reply; return the futures of the replies."""
        self._check_open()
        futures: list[asyncio.Future[Any]] = []
        for index in _indexes(packed):
            late = index == commands.Basic.Consume.index
            futures.append(self._transport.loop.create_future())
            (self._consume_replies if late else self._replies).append(futures[-1])
        self._transport.write(packed)
        return futures

    def pack(self, *methods: Frame) -> bytes:
        """Return methods as bytes for `send`, `start` or `send_unanswered`."""
        return b"".join(frame.marshal(one, self._number) for one in methods)

    def send_unanswered(self, packed: bytes) -> None:
        """Send packed methods that have no reply."""
        self._check_open()
        self._transport.write(packed)

    def listen(self, consumer_tag: str, receive: Callable[[AmqpMessage], None]) -> None:
        """Have the deliveries for a consumer tag handed to a function, in the reader."""
        self._consumers[consumer_tag] = receive

    def unlisten(self, consumer_tag: str) -> None:
        """Drop the deliveries for a consumer tag from now on."""
        self._consumers.pop(consumer_tag, None)

    def ack(self, tags: Collection[int], among: Iterable[int] = ()) -> None:
        """Acknowledge deliveries.

        Args:
            tags: The tags of the deliveries.
            among: The tags of all deliveries that are held on this channel. Those of `tags` that
                come first among them are acknowledged by one method: a quorum queue has applied
                that before the channel can be closed, while many single ones may be lost.
        """
        wanted = set(tags)
        first = list(itertools.takewhile(wanted.__contains__, sorted(among)))
        wanted.difference_update(first)
        acks = [commands.Basic.Ack(first[-1], multiple=True)] if first else []
        acks += [commands.Basic.Ack(tag) for tag in wanted]
        self.send_unanswered(self.pack(*acks))

    def publish(self, batch: Sequence[AmqpPublication]) -> AmqpConfirmation:
        """Publish messages on a channel with confirms; each must lead to a queue."""
        self._check_open()
        confirmation = AmqpConfirmation(batch, self._transport.loop)
        number, most = self._number, self._transport.frame_max - _OVERHEAD
        parts: list[bytes] = []
        for one in batch:
            parts.append(_packed_publish(number, one.exchange, one.routing_key))
            parts.append(_packed_header(number, one))
            for start in range(0, len(one.body), most):
                piece = ContentBody(one.body[start : start + most])
                parts.append(frame.marshal(piece, number))
        # After all are packed: one that cannot be must not count, for the server counts as well.
        for one in batch:
            self._published += 1
            self._unconfirmed[self._published] = confirmation, one
        self._transport.write(b"".join(parts))
        return confirmation

    async def close(self) -> None:
        """Close the channel; unacknowledged messages go back to their queues. Never raises."""
        if self.error is None:
            with contextlib.suppress(AmqpError):  # then it is closed
                await self.call(_CLOSE)
            self.fail(AmqpDisconnected("the channel was closed"))

    def abandon(self) -> None:
        """Begin to close a channel that nobody uses any more, without waiting for the reply."""
        if self.error is None:
            self.start(self.pack(_CLOSE))

    # --- frames from the server -----------------------------------------------------------------

    def fail(self, error: Exception) -> None:
        """Give the channel up; every call that waits for it gets the error."""
        if self.error is not None:
            return
        self.error = error
        self.on_failed()
        for replies in (self._replies, self._consume_replies):
            for future in replies:
                _set_error(future, error)
            replies.clear()
        for confirmation in {confirmation for confirmation, _ in self._unconfirmed.values()}:
            _set_error(confirmation.done, error)
        self._unconfirmed.clear()

    async def put(self, item: tuple[int, Any]) -> None:
        """Handle a frame at once, as pamqp has read it. The size that comes with it is not used."""
        part = item[1]
        match part:
            case ContentHeader():
                self._size = part.body_size
                self._properties = raw_properties(part.properties)
                if not self._size:
                    self._complete(b"")
            case ContentBody():
                self._receive_body(part.value)
            case commands.Basic.Ack() | commands.Basic.Nack():
                taken = isinstance(part, commands.Basic.Ack)
                self._confirm(part.delivery_tag or 0, multiple=part.multiple, taken=taken)
            case commands.Basic.Deliver() | commands.Basic.GetOk() | commands.Basic.Return():
                self._carrier = part  # a header follows, and perhaps bodies
            case _:
                self._receive_method(part)

    def _receive_body(self, payload: bytes) -> None:
        if len(payload) == self._size and not self._bodies:
            self._complete(payload)
            return
        self._bodies.append(payload)
        if sum(map(len, self._bodies)) == self._size:
            body, self._bodies = b"".join(self._bodies), []
            self._complete(body)

    def _complete(self, body: bytes) -> None:
        """Pass the message that has arrived on."""
        method, self._carrier = self._carrier, None
        message = AmqpMessage(method, AmqpProperties(self._properties), body)
        if isinstance(method, commands.Basic.Deliver):
            receive = self._consumers.get(str(method.consumer_tag))
            if receive is not None:
                receive(message)
        elif isinstance(method, commands.Basic.Return):
            for confirmation in {confirmation for confirmation, _ in self._unconfirmed.values()}:
                confirmation.note_returned(str(method.routing_key))
        else:
            self._reply(message)

    def _receive_method(self, method: Any) -> None:
        if isinstance(method, commands.Channel.Close):
            self._transport.write(self.pack(commands.Channel.CloseOk()))
            self.fail(AmqpRefused(int(method.reply_code or 0), str(method.reply_text)))
        elif isinstance(method, commands.Basic.Cancel):
            self.unlisten(str(method.consumer_tag))
            self.on_cancelled(str(method.consumer_tag))
        elif isinstance(method, commands.Channel.Flow):
            self._transport.write(self.pack(commands.Channel.FlowOk(method.active)))
        else:
            self._reply(method)

    def _reply(self, value: Any) -> None:
        late = isinstance(value, commands.Basic.ConsumeOk)
        replies = self._consume_replies if late else self._replies
        if not replies:
            self._transport.fail(AmqpDisconnected("an answer to no call"))
            return
        future = replies.popleft()
        if not future.done():
            future.set_result(value)

    def _confirm(self, tag: int, *, multiple: bool, taken: bool) -> None:
        confirmed = [tag]
        if multiple:
            # In the order of publishing, so it ends at the first one that comes later.
            confirmed = list(itertools.takewhile(lambda one: one <= tag, self._unconfirmed))
        for number in confirmed:
            found = self._unconfirmed.pop(number, None)
            if found is not None:
                confirmation, one = found
                confirmation.note(one, taken=taken)

    def _check_open(self) -> None:
        """Raise the error of a channel that failed.

        Each time a new one: an exception raised in many tasks would collect their tracebacks.
        """
        error = self.error
        if isinstance(error, AmqpRefused):
            raise AmqpRefused(error.code, str(error))
        if error is not None:
            raise AmqpDisconnected(str(error))


# Nearly all messages go to few queues. Packing this method takes as long as everything else that
# has to be done here for a message (7 us of 10), so the result is kept.
@lru_cache(maxsize=1024)
def _packed_publish(number: int, exchange: str, routing_key: str) -> bytes:
    """Pack the method that publishes a message which must lead to a queue."""
    method = commands.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True)
    return frame.marshal(method, number)


def _packed_header(number: int, publication: AmqpPublication) -> bytes:
    """Pack the content header of a message, whose properties are packed already."""
    properties, size = publication.properties, len(publication.body)
    length = _CLASS_AND_SIZE + len(properties)
    head = _CONTENT_HEAD.pack(constants.FRAME_HEADER, number, length, _BASIC, size)
    return head + properties + constants.FRAME_END_CHAR


def _indexes(packed: bytes) -> Iterator[int]:
    """Yield the indexes of packed methods."""
    at = 0
    while at < len(packed):
        size, index = _METHOD_HEAD.unpack_from(packed, at)
        yield index
        at += size + _OVERHEAD


def _set_error(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # read it, or asyncio logs an error where nobody waits any more
