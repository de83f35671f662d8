"""Between values and bytes: messages, arguments, results.

A message travels framed as JSON or as MessagePack; the first byte tells which. Pickle is never
a framing: pickled arguments lie inside a JSON message, so that a worker that does not accept
pickle can still read whose message it refuses, without touching the pickle.

Results rest as JSON. A result in another serializer lies in it as ``{"$msgpack": "<base64>"}``.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Callable, Collection
from pathlib import PurePath
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Raw

from aiotaskq.contract.message import NOTHING, Message
from aiotaskq.errors import DecodeError, EncodeError, PayloadTooLarge

Serializer: TypeAlias = Literal["json", "msgpack", "pickle"]

_WRAPPED = b'{"$'  # how a result begins that is not plain JSON
_KINDS = ("$json", "$msgpack", "$pickle")
_NULL = Raw(b"null")

ReadResult: TypeAlias = Callable[[bytes, bool], Any]
"""From an encoded result, and whether that is JSON or MessagePack, to a value."""


def to_builtin(value: Any) -> Any:
    """Return a form of `value` that msgspec knows, for types it does not."""
    dump = getattr(value, "model_dump", None)  # pydantic, without importing it
    if dump is not None:
        return dump(mode="json")
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"{type(value).__qualname__} has no form in JSON or MessagePack")


_json_encode = msgspec.json.Encoder(enc_hook=to_builtin).encode
_msgpack_encode = msgspec.msgpack.Encoder(enc_hook=to_builtin).encode
_decode_json_message = msgspec.json.Decoder(Message).decode
_decode_msgpack_message = msgspec.msgpack.Decoder(Message).decode


def encode_json(value: Any) -> bytes:
    """Encode as JSON.

    Raises:
        EncodeError: The value has no form in JSON, NaN and the infinities included.
    """
    try:
        encoded = _json_encode(value)
        # msgspec writes NaN as null, which would hand the reader another value than was meant.
        if b"null" in encoded and value is not None:
            _refuse_nan(msgspec.to_builtins(value, enc_hook=to_builtin))
    except Exception as error:  # a value's own methods may raise anything
        raise EncodeError(f"{_name(value)} cannot be written as JSON: {error}") from error
    return encoded


def _refuse_nan(value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(
            "it holds NaN or an infinity, which JSON has not; use None, or the serializer msgpack"
        ) from None


def encode_msgpack(value: Any) -> bytes:
    """Encode as MessagePack, or raise `EncodeError`."""
    try:
        return _msgpack_encode(value)
    except Exception as error:  # as above
        raise EncodeError(f"{_name(value)} cannot be written as MessagePack: {error}") from error


def encode_pickle(value: Any) -> bytes:
    """Pickle, or raise `EncodeError`."""
    try:
        return pickle.dumps(value)
    except Exception as error:  # as above
        raise EncodeError(f"{_name(value)} cannot be pickled: {error}") from error


def _name(value: Any) -> str:
    return f"a value of type {type(value).__qualname__}"


class Codec:
    """How one application writes and reads its messages and results.

    Args:
        task_serializer: What messages are written in.
        result_serializer: What results are written in.
        accept: Serializers that are read. Pickle is read only if it is named here.
        max_payload: Bytes allowed for an encoded message.
        max_result: Bytes allowed for an encoded result.

    Attributes:
        settings: The arguments it was made with, to make its like in another process.
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

    def pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Raw, Raw, bytes | None]:
        """Encode arguments for a `Message`: its `args`, `kwargs` and `pickled`.

        Raises:
            EncodeError: One has no form in the serializer; it is named.
        """
        if self._task_serializer == "pickle":
            return NOTHING, NOTHING, encode_pickle((args, kwargs))
        encode = encode_json if self._task_serializer == "json" else encode_msgpack
        try:
            return (
                Raw(encode(args)) if args else NOTHING,
                Raw(encode(kwargs)) if kwargs else NOTHING,
                None,
            )
        except EncodeError:
            for name, value in [*enumerate(args, 1), *kwargs.items()]:
                try:
                    encode(value)
                except EncodeError as error:
                    raise EncodeError(f"argument {name}: {error}") from error
            raise  # no single one is to blame, such as a reference in a circle

    def encode_message(self, message: Message) -> bytes:
        """Frame a message whose arguments this codec has packed.

        Raises:
            EncodeError: A header has no form in JSON or MessagePack.
            PayloadTooLarge: It exceeds the limit for messages.
        """
        framing = _msgpack_encode if self._task_serializer == "msgpack" else _json_encode
        try:
            body = framing(message)
        except Exception as error:  # such as a header that is no text
            raise EncodeError(f"a message for {message.task} cannot be written: {error}") from error
        return self._fits(body, message)

    def encode_again(self, message: Message, body: bytes) -> bytes:
        """Frame a changed `message` as `body`, which it was decoded from, was framed."""
        return _json_encode(message) if is_json(body) else _msgpack_encode(message)

    def _fits(self, body: bytes, message: Message) -> bytes:
        if len(body) > self._max_payload:
            raise PayloadTooLarge(
                f"a message for {message.task} takes {len(body):,} bytes, and"
                f" max_payload_size allows {self._max_payload:,}: pass a reference to the data"
                " instead, or raise the setting",
                size=len(body),
                limit=self._max_payload,
            )
        return body

    def decode_message(self, body: bytes) -> Message:
        """Read a message of either framing.

        Raises:
            DecodeError: The bytes are no message, or are written in what is not accepted.
        """
        framing = "json" if is_json(body) else "msgpack"
        try:
            message = (_decode_json_message if framing == "json" else _decode_msgpack_message)(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(f"not a message: {error}") from error
        if message.pickled is not None:
            framing = "pickle"
        if framing not in self._accept:
            raise DecodeError(
                f"written in {framing}, which accept_content does not name"
                f" ({', '.join(sorted(self._accept))})"
            )
        return message

    def encode_result(self, value: Any) -> Raw:
        """Encode what a task returned, as JSON.

        Raises:
            EncodeError: The value has no form in the result serializer.
            PayloadTooLarge: It exceeds the limit for results.
        """
        if value is None:
            return _NULL
        encoded = self._encode_result(value)
        if len(encoded) > self._max_result:
            raise PayloadTooLarge(
                f"the result takes {len(encoded):,} bytes, and max_result_size allows"
                f" {self._max_result:,}: return a reference to the data, or raise the setting",
                size=len(encoded),
                limit=self._max_result,
            )
        return Raw(encoded)

    def decode_result(self, raw: Raw, read: ReadResult | None = None) -> Any:
        """Read a result, given what reads JSON or MessagePack into the annotated type.

        Raises:
            DecodeError: It is no result, or is written in what is not accepted.
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
        # A plain one may look alike: PostgreSQL's jsonb puts short keys first.
        if len(fields) > 1 or kind not in _KINDS:
            return read(encoded, True)
        if kind == "$json":
            return read(bytes(inner), True)
        data = base64.b64decode(msgspec.json.decode(inner, type=str), validate=True)
        if kind[1:] not in self._accept:
            raise DecodeError(
                f"the result is written in {kind[1:]}, which accept_content does not name"
                f" ({', '.join(sorted(self._accept))})"
            )
        # Pickle was switched on by name, on this very side.
        return read(data, False) if kind == "$msgpack" else _unpickle(data, "the result")


def decode_plain(encoded: bytes, json: bool) -> Any:
    """Read JSON or MessagePack into what it says by itself: dicts, lists, texts, numbers."""
    return msgspec.json.decode(encoded) if json else msgspec.msgpack.decode(encoded)


def is_json(body: bytes) -> bool:
    """Whether a message is framed as JSON; MessagePack maps begin with another byte."""
    return body[:1] == b"{"


def unpickle(data: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read pickled arguments. Only for a message that `Codec.decode_message` let through."""
    loaded = _unpickle(data, "the arguments")
    if not (isinstance(loaded, tuple) and len(loaded) == 2):
        raise DecodeError("the arguments are pickled, and are no pair of args and kwargs")
    args, kwargs = loaded
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise DecodeError("the arguments are pickled, and are no tuple and dict")
    return args, kwargs


def _unpickle(data: bytes, what: str) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:  # unpickling runs arbitrary code, which may raise anything
        raise DecodeError(f"{what} cannot be unpickled: {error}") from error


def _encode_json_result(value: Any) -> bytes:
    encoded = encode_json(value)
    # A dict of the user's that looks like a wrapped result gets a wrapping of its own.
    return b'{"$json":' + encoded + b"}" if encoded.startswith(_WRAPPED) else encoded


def _wrap(kind: str, data: bytes) -> bytes:
    return b'{"$%s":"%s"}' % (kind.encode(), base64.b64encode(data))


_RESULT_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "json": _encode_json_result,
    "msgpack": lambda value: _wrap("msgpack", encode_msgpack(value)),
    "pickle": lambda value: _wrap("pickle", encode_pickle(value)),
}
