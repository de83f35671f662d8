"""Records of the ledger, and the questions to consumers with their answers.

They are MessagePack, and processes of different versions read them: field names and tags stay as
they are. A record of a later version is read as one that changes nothing.
"""

from __future__ import annotations

import uuid
from typing import TypeAlias

import msgspec

from aiotaskq.drivers.rabbitmq.messages import Lineage

REPLIES = "amq.rabbitmq.reply-to"
"""The address that the server replaces with one of the connection that asks, which it begins."""


class ConsumerJoined(msgspec.Struct, frozen=True, tag="join"):
    """A consumer is about to work."""

    consumer: str
    queues: tuple[str, ...]
    about: bytes


class ConsumerLeft(msgspec.Struct, frozen=True, tag="leave"):
    """A consumer is gone."""

    consumer: str


class MessagesCancelled(msgspec.Struct, frozen=True, tag="cancel"):
    """Messages must never be handed out again.

    Args:
        name: The name of this record.
        ids: The ids of the messages.
        running: Whether messages that are held now are meant as well.
    """

    name: str
    ids: tuple[str, ...]
    running: bool


class MessagesRestored(msgspec.Struct, frozen=True, tag="restore"):
    """Messages that were cancelled may be handed out again.

    Args:
        name: The name of this record.
        ids: The ids of the messages.
    """

    name: str
    ids: tuple[str, ...]


class ConsumerSurvived(msgspec.Struct, frozen=True, tag="alive"):
    """A consumer has lost its connection, but its process lives: the loss was no crash.

    Args:
        consumer: Its id. It has lost its messages once, however often this is written.
        held: The messages that it held.
    """

    consumer: str
    held: tuple[Lineage, ...]


class LedgerRead(msgspec.Struct, frozen=True, tag="look"):
    """Somebody began to read the ledger: it has an end to read to, though nothing else happened."""


LedgerRecord: TypeAlias = (
    ConsumerJoined
    | ConsumerLeft
    | MessagesCancelled
    | MessagesRestored
    | ConsumerSurvived
    | LedgerRead
)


class ConsumerQuestion(msgspec.Struct, frozen=True):
    """A question to one consumer.

    Args:
        after: The name of a record; it is answered when that was read. Empty: at once.
        ids: The ids of messages; the answer lists those that a worker was given.
    """

    after: str = ""
    ids: tuple[str, ...] = ()


class ConsumerAnswer(msgspec.Struct, frozen=True):
    """The answer of a consumer.

    Args:
        consumer: Its id.
        held: The ids among those of the question that a worker was given.
        counts: The number of messages that it holds, by queue.
    """

    consumer: str
    held: tuple[str, ...]
    counts: dict[str, int]


_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_decode_record = msgspec.msgpack.Decoder(LedgerRecord).decode
encode = msgspec.msgpack.Encoder().encode
_decode_question = msgspec.msgpack.Decoder(ConsumerQuestion).decode
_decode_answer = msgspec.msgpack.Decoder(ConsumerAnswer).decode


def decode_record(body: bytes) -> LedgerRecord:
    """Read a record; one of a later version, or of nobody of us, changes nothing."""
    try:
        record: LedgerRecord = _decode_record(body)
    except _UNREADABLE:
        return LedgerRead()
    return record


def decode_question(body: bytes) -> ConsumerQuestion | None:
    """Read a question; None if it is none: anybody may write to the queue of a consumer."""
    try:
        return _decode_question(body)
    except _UNREADABLE:
        return None


def decode_answer(body: bytes) -> ConsumerAnswer | None:
    """Read an answer; None if it is none."""
    try:
        return _decode_answer(body)
    except _UNREADABLE:
        return None


def new_record_name() -> str:
    """Return a name for a record, by which a question can refer to it."""
    return uuid.uuid4().hex
