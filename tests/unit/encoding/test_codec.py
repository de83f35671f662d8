"""The codec: arguments, messages and results as bytes."""

from __future__ import annotations

import base64
import enum
import json
import pickle
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, Literal
from uuid import UUID

import msgspec
import pytest
from msgspec import Raw
from pydantic import BaseModel

from aiotaskq.contract.message import Message, RetryPolicy
from aiotaskq.encoding.codec import (
    Codec,
    Serializer,
    encode_json,
    encode_msgpack,
    encode_pickle,
    is_json,
    unpickle,
)
from aiotaskq.errors import CodecError, DecodeError, EncodeError, PayloadTooLarge

Framing = Literal["json", "msgpack"]
FRAMINGS: tuple[Framing, ...] = ("json", "msgpack")
ALL = ("json", "msgpack", "pickle")


class Colour(enum.Enum):
    RED = "red"


class Model(BaseModel):
    id: UUID
    at: date


@dataclass
class Point:
    x: int
    y: float | None = None


class Hostile:
    """An object whose methods raise."""

    @property
    def model_dump(self) -> Any:
        raise RuntimeError("no")


class Canary:
    """An object that records that it was unpickled."""

    woken = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _wake, ()


def _wake() -> None:
    Canary.woken += 1


def message(codec: Codec, *args: Any, **kwargs: Any) -> Message:
    packed, named, pickled = codec.pack(args, kwargs)
    return Message(id="1", task="t", args=packed, kwargs=named, pickled=pickled)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), '"2026-01-02T03:04:05Z"'),
        (Decimal("1.10"), '"1.10"'),
        (Colour.RED, '"red"'),
        (Point(1), '{"x":1,"y":null}'),
        (PurePosixPath("/a/b"), '"/a/b"'),
        (b"\xff", '"/w=="'),
        (Model(id=UUID(int=1), at=date(2026, 1, 2)), None),
        (2**70, str(2**70)),
        ({1: None, Colour.RED: [None]}, '{"1":null,"red":[null]}'),
    ],
)
def test_values_have_a_form_in_json(value: Any, text: str | None) -> None:
    encoded = encode_json(value).decode()
    assert text is None or encoded == text
    json.loads(encoded)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        [float("inf"), None],
        {"a": {"b": -float("inf")}},
        "\ud800",
        object(),
        Hostile(),
        Model,
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_without_a_form_in_json_are_an_encode_error(value: Any) -> None:
    with pytest.raises(EncodeError):
        encode_json(value)


def test_null_is_told_from_nan() -> None:
    assert encode_json([None, "null"]) == b'[null,"null"]'


@pytest.mark.parametrize(
    "value", [object(), "\ud800", 2**64, Hostile()], ids=lambda value: type(value).__name__
)
def test_values_without_a_form_in_messagepack_are_an_encode_error(value: Any) -> None:
    with pytest.raises(EncodeError, match="MessagePack"):
        encode_msgpack(value)


def test_values_that_cannot_be_pickled_are_an_encode_error() -> None:
    with pytest.raises(EncodeError, match="pickled"):
        encode_pickle(lambda: None)


@pytest.mark.parametrize("encode", [encode_json, encode_msgpack])
def test_endless_nesting_is_an_encode_error(encode: Any) -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(EncodeError):
        encode(value)


# --- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_message_comes_back_as_it_was(framing: Framing) -> None:
    codec = Codec(task_serializer=framing)
    sent = msgspec.structs.replace(
        message(codec, 1, "two", key=[3]), retry=RetryPolicy(max_attempts=7), headers={"a": "b"}
    )
    body = codec.encode_message(sent)
    read = codec.decode_message(body)
    assert is_json(body) is (framing == "json")
    assert msgspec.structs.replace(read, args=sent.args, kwargs=sent.kwargs) == sent
    assert bytes(read.args) == bytes(sent.args)
    assert bytes(read.kwargs) == bytes(sent.kwargs)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_changed_message_keeps_its_framing_and_arguments(framing: Framing) -> None:
    codec = Codec(task_serializer=framing)
    body = codec.encode_message(message(codec, 1, "two"))
    read = codec.decode_message(body)
    other = Codec(task_serializer="json")
    again = other.encode_again(msgspec.structs.replace(read, attempt=2), body)
    assert is_json(again) is is_json(body)
    assert codec.decode_message(again).attempt == 2
    assert bytes(codec.decode_message(again).args) == bytes(read.args)


def test_no_arguments_take_no_room() -> None:
    codec = Codec()
    assert codec.encode_message(message(codec)) == b'{"id":"1","task":"t"}'


def test_a_newer_senders_fields_are_ignored() -> None:
    assert Codec().decode_message(b'{"id":"1","task":"t","colour":"red"}').task == "t"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b'{"id":1,"task":"t"}',
        b'{"id":"1","task":"t","priority":"high"}',
        b'{"id":"\xff","task":"t"}',
        b'{"id":"1","task":"t","retry":{"max_attempts":"x"}}',
        b'{"id":"1","task":"t","x":' + b"[" * 100_000,
        b"\x81" * 10_000,
        pickle.dumps({"id": "1", "task": "t"}),
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bytes_that_are_no_message_are_a_decode_error(body: bytes) -> None:
    with pytest.raises(DecodeError, match="not a message"):
        Codec().decode_message(body)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_framing_that_is_not_accepted_is_refused_by_name(framing: Framing) -> None:
    sender = Codec(task_serializer=framing)
    (other,) = {"json", "msgpack"} - {framing}
    with pytest.raises(DecodeError, match=f"written in {framing}.*accept_content.*{other}"):
        Codec(accept=[other]).decode_message(sender.encode_message(message(sender, 1)))


def test_pickle_is_refused_without_reading_it_unless_it_is_accepted() -> None:
    sender = Codec(task_serializer="pickle", accept=ALL)
    body = sender.encode_message(message(sender, Canary()))
    before = Canary.woken
    with pytest.raises(DecodeError, match="pickle"):
        Codec().decode_message(body)
    assert Canary.woken == before


def test_pickled_arguments_come_back_where_pickle_is_accepted() -> None:
    sender = Codec(task_serializer="pickle", accept=ALL)
    read = sender.decode_message(sender.encode_message(message(sender, {1, 2}, key=1j)))
    assert read.pickled is not None
    assert unpickle(read.pickled) == (({1, 2},), {"key": 1j})


@pytest.mark.parametrize(
    "data", [b"", b"junk", pickle.dumps(5), pickle.dumps((1, 2)), pickle.dumps(([], {}, 3))]
)
def test_bytes_that_are_no_pickled_call_are_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError, match="the arguments"):
        unpickle(data)


def test_a_message_over_the_limit_is_refused_with_both_sizes() -> None:
    codec = Codec(max_payload=100)
    assert codec.encode_message(message(codec, "x"))
    with pytest.raises(PayloadTooLarge, match="max_payload_size") as refused:
        codec.encode_message(message(codec, "x" * 200))
    assert refused.value.limit == 100
    assert refused.value.size > 200


def test_a_header_that_is_no_text_is_an_encode_error() -> None:
    codec = Codec()
    with pytest.raises(EncodeError, match="message for t"):
        codec.encode_message(Message(id="1", task="t", headers={"a": object()}))  # type: ignore[dict-item]  # as a middleware may get it wrong


# --- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ALL)
@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        2**63,
        "text",
        [1, [2]],
        {"a": None},
        {},
        {"$json": 1},
        {"$msgpack": "AA=="},
        {"$pickle": base64.b64encode(pickle.dumps(1)).decode()},
        {"$ref": "#/a"},
        {"$json": {"$json": 2}},
        {"$a": 1, "b": 2},
    ],
    ids=repr,
)
def test_a_result_comes_back_and_rests_as_json(serializer: Serializer, value: Any) -> None:
    codec = Codec(result_serializer=serializer, accept=ALL)
    raw = codec.encode_result(value)
    json.loads(bytes(raw))
    assert codec.decode_result(raw) == value


@pytest.mark.parametrize(
    "value", [{"$a": 1, "bbb": 2}, {"aaa": 1, "$b": 2}, {"aaaaaaa": 1, "$json": 2}, {"$json": 1}]
)
def test_a_result_survives_a_store_that_orders_keys_as_jsonb_does(value: dict[str, Any]) -> None:
    def jsonb(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: jsonb(value[k]) for k in sorted(value, key=lambda k: (len(k), k))}
        return value

    stored = json.dumps(jsonb(json.loads(bytes(Codec().encode_result(value)))))
    assert Codec().decode_result(Raw(stored.encode())) == value


def test_a_pickled_result_is_read_only_where_pickle_is_accepted() -> None:
    raw = Codec(result_serializer="pickle", accept=ALL).encode_result(Canary())
    before = Canary.woken
    with pytest.raises(DecodeError, match="accept_content"):
        Codec().decode_result(raw)
    assert Canary.woken == before


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"$msgpack":5}',
        b'{"$msgpack":"%%%"}',
        b'{"$msgpack":"xA=="}',
        b'{"$pickle":"AAAA"}',
        b'{"$',
        b"[" * 100_000,
        b'"\xff"',
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_a_broken_result_is_a_decode_error(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        Codec(accept=ALL).decode_result(Raw(raw))


@pytest.mark.parametrize("serializer", ALL)
def test_a_result_over_the_limit_is_refused(serializer: Serializer) -> None:
    with pytest.raises(PayloadTooLarge, match="max_result_size"):
        Codec(result_serializer=serializer, max_result=100).encode_result("x" * 200)


@pytest.mark.parametrize("serializer", FRAMINGS)
def test_a_result_without_a_form_is_a_codec_error(serializer: Framing) -> None:
    with pytest.raises(CodecError, match="object"):
        Codec(result_serializer=serializer).encode_result(object())


def test_a_codec_can_be_made_again_from_its_settings() -> None:
    codec = Codec(task_serializer="pickle", accept={"json", "pickle"}, max_payload=5)
    assert Codec(**codec.settings).settings == codec.settings  # type: ignore[arg-type]  # plain values by name
