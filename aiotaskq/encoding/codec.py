"""Encoding of messages, arguments and results.

A message is encoded as JSON or as MessagePack; the first byte shows which. With the serializer
pickle the message itself is JSON and contains the pickled arguments. So a worker that does not
accept pickle can read which task it refuses, without unpickling anything.

Results are stored as JSON. A result of another serializer is wrapped: ``{"$msgpack": "<base64>"}``.
So is one that its store cannot keep as it is, as text: ``{"$text": "<JSON>"}``.

How a value is written, so that it can be read as it was, is the matter of `Writer`: see
`aiotaskq.encoding.forms`. Without one, a value gets the plain form of the serializer.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import msgspec
from msgspec import Raw

from aiotaskq.contract.message import NOTHING, Message
from aiotaskq.encoding.reduction import is_model, reduce
from aiotaskq.encoding.tags import MARK, resolve
from aiotaskq.errors import DecodeError, EncodeError, PayloadTooLarge

Serializer: TypeAlias = Literal["json", "msgpack", "pickle"]

_WRAPPED = b'{"$'  # the beginning of a wrapped result
_KINDS = ("$json", "$text", "$msgpack", "$pickle")
_NULL = Raw(b"null")
_MOST_HISTORY = 256 * 1024  # bytes that a worker may have added to a message: its earlier attempts

ReadResult: TypeAlias = Callable[[bytes, bool], Any]
"""Decodes a result: the bytes, and True for JSON or False for MessagePack."""


class Writer(Protocol):
    """The way to write one value: a parameter of a task, or its result."""

    @property
    def plain(self) -> frozenset[type]:
        """The types whose plain form is certainly read as it was."""
        ...

    def write(self, value: Any, *, json: bool) -> bytes:
        """Return a value in JSON or MessagePack, in a form that is read as it was.

        Raises:
            EncodeError: There is none.
        """
        ...


class Writers(Protocol):
    """The writers of the arguments of a task."""

    def are_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether all these, written plainly, are certainly read as they were."""
        ...

    def row(self, count: int) -> Sequence[Writer]:
        """Return those of the first `count` positional arguments."""
        ...

    def named(self, name: str) -> Writer:
        """Return that of a keyword argument."""
        ...


def to_builtin(value: Any) -> Any:
    """Convert a value of a type that msgspec cannot encode into one that it can."""
    return reduce(value, _dump)


def _dump(value: Any) -> Any:
    if is_model(type(value)):
        return value.model_dump(mode="json", by_alias=False, round_trip=True, warnings=False)
    return None


_json_encode = msgspec.json.Encoder(enc_hook=to_builtin).encode
_msgpack_encode = msgspec.msgpack.Encoder(enc_hook=to_builtin).encode
_decode_json_message = msgspec.json.Decoder(Message).decode
_decode_msgpack_message = msgspec.msgpack.Decoder(Message).decode


def encode_json(value: Any) -> bytes:
    """Encode a value as JSON.

    Raises:
        EncodeError: JSON cannot represent the value. That includes NaN and infinity.
    """
    try:
        encoded = _json_encode(value)
        # msgspec writes NaN as null: the reader would get another value.
        if b"null" in encoded and value is not None:
            _refuse_nan(msgspec.to_builtins(value, enc_hook=to_builtin))
    except Exception as error:  # methods of the value may raise anything
        raise EncodeError(f"{_name(value)} cannot be encoded as JSON: {error}") from error
    return encoded


def _refuse_nan(value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(
            "it contains NaN or infinity, which JSON does not have; use None, or the serializer"
            " msgpack"
        ) from None


def encode_msgpack(value: Any) -> bytes:
    """Encode a value as MessagePack, or raise `EncodeError`."""
    try:
        return _msgpack_encode(value)
    except Exception as error:  # as above
        raise EncodeError(f"{_name(value)} cannot be encoded as MessagePack: {error}") from error


def encode_pickle(value: Any) -> bytes:
    """Pickle a value, or raise `EncodeError`."""
    try:
        return pickle.dumps(value)
    except Exception as error:  # as above
        raise EncodeError(f"{_name(value)} cannot be pickled: {error}") from error


def _name(value: Any) -> str:
    return f"a value of type {type(value).__qualname__}"


class Codec:
    """Encoder and decoder of the messages and results of one application.

    Args:
        task_serializer: The serializer of messages.
        result_serializer: The serializer of results.
        accept: The serializers that are decoded. Pickle is decoded only if it is among them.
        max_payload: The largest encoded message, in bytes.
        max_result: The largest encoded result, in bytes.

    Attributes:
        settings: The arguments it was made with, to make the same codec in another process.
    """

    def __init__(
        self,
        *,
        task_serializer: Serializer = "json",
        result_serializer: Serializer = "json",
        accept: Collection[str] = ("json", "msgpack"),
        max_payload: int = 1_048_576,
        max_result: int = 1_048_576,
    ) -> None:
        self.settings = {
            "task_serializer": task_serializer,
            "result_serializer": result_serializer,
            "accept": tuple(accept),
            "max_payload": max_payload,
            "max_result": max_result,
        }
        self._task_serializer = task_serializer
        self._encode_result = _RESULT_ENCODERS[result_serializer]
        self._accept = frozenset(accept)
        self._max_payload = max_payload
        self._max_result = max_result

    def pack(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], writers: Writers | None = None
    ) -> tuple[Raw, Raw, bytes | None]:
        """Encode arguments for a `Message`: its `args`, `kwargs` and `pickled`.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
            writers: Their writers; None: they are written plainly.

        Raises:
            EncodeError: The serializer cannot encode an argument; the error names it if there are
                writers.
        """
        if self._task_serializer == "pickle":
            return NOTHING, NOTHING, encode_pickle((args, kwargs))
        json = self._task_serializer == "json"
        if writers is None or writers.are_plain(args, kwargs):
            encode = encode_json if json else encode_msgpack
            try:
                row, named = encode(args) if args else b"", encode(kwargs) if kwargs else b""
            except EncodeError:
                if writers is None:
                    raise
            else:
                if writers is None or (row.find(MARK) < 0 and (not named or named.find(MARK) < 0)):
                    return Raw(row) if row else NOTHING, Raw(named) if named else NOTHING, None
        return *self._pack_each(args, kwargs, writers, json=json), None

    def _pack_each(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], writers: Writers, *, json: bool
    ) -> tuple[Raw, Raw]:
        """Write each argument by itself."""

        def write(name: object, writer: Writer, value: Any) -> Raw:
            try:
                return Raw(writer.write(value, json=json))
            except EncodeError as error:
                raise EncodeError(f"argument {name}: {error}") from error

        encode = _json_encode if json else _msgpack_encode
        row = [
            write(number, writer, value)
            for number, (writer, value) in enumerate(
                zip(writers.row(len(args)), args, strict=True), 1
            )
        ]
        named = {name: write(name, writers.named(name), value) for name, value in kwargs.items()}
        return Raw(encode(row)) if row else NOTHING, Raw(encode(named)) if named else NOTHING

    def encode_message(self, message: Message) -> bytes:
        """Encode a message whose arguments this codec has packed.

        Raises:
            EncodeError: A header cannot be encoded.
            PayloadTooLarge: The message is larger than the limit.
        """
        framing = _msgpack_encode if self._task_serializer == "msgpack" else _json_encode
        try:
            body = framing(message)
        except Exception as error:  # for example a header that is not a text
            raise EncodeError(f"a message for {message.task} cannot be encoded: {error}") from error
        return self._fits(body, message)

    def encode_again(self, message: Message, body: bytes) -> bytes:
        """Encode a changed message in the same encoding as `body`, which it was decoded from."""
        return _json_encode(message) if is_json(body) else _msgpack_encode(message)

    def _fits(self, body: bytes, message: Message) -> bytes:
        if len(body) > self._max_payload:
            raise PayloadTooLarge(
                f"a message for {message.task} has {len(body):,} bytes, and max_payload_size allows"
                f" {self._max_payload:,}: pass a reference to the data instead, or increase the"
                " setting",
                size=len(body),
                limit=self._max_payload,
            )
        return body

    def decode_message(self, body: bytes) -> Message:
        """Decode a message in either encoding.

        Raises:
            DecodeError: The bytes are not a message, its serializer is not accepted, or they are
                more than a sender may send.
        """
        # Whoever can write to the store sends what they like. A worker adds the earlier attempts.
        if len(body) > self._max_payload + _MOST_HISTORY:
            raise self._too_large_to_read(body)
        framing = "json" if is_json(body) else "msgpack"
        try:
            message = (_decode_json_message if framing == "json" else _decode_msgpack_message)(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(f"not a message: {error}") from error
        if len(body) > self._max_payload and not (message.history or message.unknown_for):
            raise self._too_large_to_read(body)
        if message.pickled is not None:
            framing = "pickle"
        if framing not in self._accept:
            raise DecodeError(
                f"written in {framing}, which accept_content does not include"
                f" ({', '.join(sorted(self._accept))})"
            )
        return message

    def _too_large_to_read(self, body: bytes) -> DecodeError:
        return DecodeError(
            f"not read: it has {len(body):,} bytes, and max_payload_size allows"
            f" {self._max_payload:,}"
        )

    def encode_result(self, value: Any, writer: Writer | None = None) -> Raw:
        """Encode the return value of a task, as JSON.

        Args:
            value: The value.
            writer: Its writer; None: it is written plainly.

        Raises:
            EncodeError: The result serializer cannot encode the value.
            PayloadTooLarge: The result is larger than the limit.
        """
        if value is None:
            return _NULL
        try:
            encoded = self._encode_result(value, writer)
        except EncodeError as error:
            raise EncodeError(f"the result cannot be kept: {error}") from error
        if len(encoded) > self._max_result:
            raise PayloadTooLarge(
                f"the result has {len(encoded):,} bytes, and max_result_size allows"
                f" {self._max_result:,}: return a reference to the data, or increase the setting",
                size=len(encoded),
                limit=self._max_result,
            )
        return Raw(encoded)

    def decode_result(self, raw: Raw, read: ReadResult | None = None) -> Any:
        """Decode a result.

        Args:
            raw: The stored result.
            read: Decodes JSON or MessagePack into the annotated type; None: into plain values.

        Raises:
            DecodeError: The bytes are not a result, or its serializer is not accepted.
        """
        try:
            return self._read_result(bytes(raw), decode_plain if read is None else read)
        except (ValueError, RecursionError) as error:  # every error of msgspec is a ValueError
            raise DecodeError(f"not a result: {error}") from error

    def _read_result(self, encoded: bytes, read: ReadResult) -> Any:
        if not encoded.startswith(_WRAPPED):
            return read(encoded, True)
        fields = msgspec.json.decode(encoded, type=dict[str, Raw])
        kind, inner = next(iter(fields.items()))
        # A plain dict may look like a wrapped one: PostgreSQL's jsonb puts short keys first.
        if len(fields) > 1 or kind not in _KINDS:
            return read(encoded, True)
        if kind == "$json":
            return read(bytes(inner), True)
        text = msgspec.json.decode(inner, type=str)
        if kind == "$text":
            return self._read_result(text.encode(), read)
        data = base64.b64decode(text, validate=True)
        if kind[1:] not in self._accept:
            raise DecodeError(
                f"the result is written in {kind[1:]}, which accept_content does not include"
                f" ({', '.join(sorted(self._accept))})"
            )
        # Pickle is safe here only because this application accepts it by name.
        return read(data, False) if kind == "$msgpack" else _unpickle(data, "the result")


def decode_plain(encoded: bytes, json: bool) -> Any:
    """Decode JSON or MessagePack into plain values, and tagged forms into their values.

    Raises:
        ValueError: It is neither JSON nor MessagePack, or a tagged form is none of ours.
    """
    value = msgspec.json.decode(encoded) if json else msgspec.msgpack.decode(encoded)
    return resolve(value)[0] if encoded.find(MARK) >= 0 else value


def is_json(body: bytes) -> bool:
    """Return whether a message is JSON; a map in MessagePack begins with another byte."""
    return body[:1] == b"{"


def unpickle(data: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Unpickle arguments. Only for a message that `Codec.decode_message` has accepted."""
    loaded = _unpickle(data, "the arguments")
    if not (isinstance(loaded, tuple) and len(loaded) == 2):
        raise DecodeError("the arguments are pickled, and are not a pair of args and kwargs")
    args, kwargs = loaded
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise DecodeError("the arguments are pickled, and are not a tuple and a dict")
    return args, kwargs


def _unpickle(data: bytes, what: str) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:  # unpickling runs any code, which may raise anything
        raise DecodeError(f"{what} cannot be unpickled: {error}") from error


def _write(value: Any, writer: Writer | None, *, json: bool) -> bytes:
    encode = encode_json if json else encode_msgpack
    if writer is None:
        return encode(value)
    if type(value) in writer.plain:
        try:
            encoded = encode(value)
        except EncodeError:  # such as NaN
            return writer.write(value, json=json)
        if encoded.find(MARK) < 0:
            return encoded
    return writer.write(value, json=json)


def _encode_json_result(value: Any, writer: Writer | None) -> bytes:
    encoded = _write(value, writer, json=True)
    # A dict of the user that looks like a wrapped result is wrapped itself.
    return b'{"$json":' + encoded + b"}" if encoded.startswith(_WRAPPED) else encoded


def _wrap(kind: str, data: bytes) -> bytes:
    return b'{"$%s":"%s"}' % (kind.encode(), base64.b64encode(data))


_RESULT_ENCODERS: dict[str, Callable[[Any, Writer | None], bytes]] = {
    "json": _encode_json_result,
    "msgpack": lambda value, writer: _wrap("msgpack", _write(value, writer, json=False)),
    "pickle": lambda value, _: _wrap("pickle", encode_pickle(value)),
}
