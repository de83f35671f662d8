"""The arguments of a task: checked against its signature, converted to its annotations.

The sender only checks that a call fits the signature. The worker decodes each argument from the
bytes of the message directly into the annotated type, so that a task never runs with a raw value.

The usual case is fast: all positional arguments are decoded in one step by a decoder of their tuple
of types, the one that fitted the call before. Only where that fails are they decoded one by one,
which tells the argument that is wrong.
"""

from __future__ import annotations

import inspect
import json as stdlib_json
from collections.abc import Callable, Mapping
from pathlib import PurePath
from types import MethodType, SimpleNamespace
from typing import Any, TypeAlias, get_type_hints

import msgspec
from msgspec import Raw

from aiotaskq.contract.message import Message
from aiotaskq.encoding.codec import decode_plain, is_json, unpickle
from aiotaskq.errors import ConfigError, DecodeError

Read: TypeAlias = Callable[[Raw | bytes], Any]
"""Decodes bytes into a value of one type."""

_UNTYPED = (inspect.Parameter.empty, Any, object)


def from_builtin(kind: Any, value: Any) -> Any:
    """Build a value of a type that msgspec does not know from decoded data."""
    validate = getattr(kind, "model_validate_json", None)  # pydantic, without importing it
    if validate is not None:
        # As JSON, which the sender's `model_dump(mode="json")` made: a strict model would refuse
        # the text of a date otherwise. Not msgspec's JSON, which has no NaN.
        return _in_one_line(validate, stdlib_json.dumps(value))
    if isinstance(kind, type) and issubclass(kind, PurePath):
        return kind(value)
    raise ValueError(f"a {getattr(kind, '__qualname__', kind)} cannot be built from JSON")


def _in_one_line(validate: Callable[[Any], Any], value: Any) -> Any:
    try:
        return validate(value)
    except ValueError as error:  # pydantic's own message has several lines for each field
        raise ValueError("; ".join(str(error).splitlines())) from error


def reader(annotation: Any, *, json: bool) -> Read:
    """Return a function that decodes bytes into the annotated type.

    Raises:
        ConfigError: Nothing here can convert to the annotation.
    """
    try:
        return _plain_reader(annotation, json=json)
    except TypeError as unsupported:
        return _pydantic_reader(annotation, unsupported, json=json)
    except Exception as error:  # the annotations inside a class are arbitrary expressions
        raise ConfigError(f"{annotation!r} cannot be resolved: {error}") from error


def _plain_reader(annotation: Any, *, json: bool) -> Read:
    module: Any = msgspec.json if json else msgspec.msgpack
    if annotation in _UNTYPED:
        return module.Decoder().decode  # type: ignore[no-any-return]  # msgspec's two modules share no type
    return module.Decoder(annotation, dec_hook=from_builtin).decode  # type: ignore[no-any-return]  # as above


def _pydantic_reader(annotation: Any, unsupported: TypeError, *, json: bool) -> Read:
    """Use pydantic where it is installed: it knows unions that msgspec does not know."""
    try:
        from pydantic import ConfigDict, TypeAdapter
    except ImportError:
        raise ConfigError(
            f"{unsupported}; `pip install aiotaskq[pydantic]` can convert to it, or annotate"
            " the parameter otherwise"
        ) from unsupported
    try:
        # The tuple: pydantic takes no settings for a class, only for what is made of classes.
        # The setting: msgspec wrote the bytes.
        row: Any = tuple
        adapter = TypeAdapter(row[annotation], config=ConfigDict(val_json_bytes="base64"))
    except Exception:  # it may ask the annotated classes, whose code is arbitrary
        raise ConfigError(f"{unsupported}; annotate the parameter otherwise") from unsupported
    if json:
        return lambda raw: _in_one_line(adapter.validate_json, b"[%b]" % bytes(raw))[0]
    decode = msgspec.msgpack.Decoder().decode
    return lambda raw: _in_one_line(adapter.validate_python, (decode(raw),))[0]


class Arguments:
    """The parameters of a function; of a method, all but the first.

    Raises:
        ConfigError: The method has no first parameter.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        try:
            self._signature = inspect.signature(fn)
        except ValueError as error:
            raise ConfigError(
                f"{_name(fn)} has no parameters to be found; with bind=True the first one is the"
                f" task itself: def {getattr(fn, '__name__', 'task')}(self, ...)"
            ) from error
        parameters = self._signature.parameters.values()
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        self._names = tuple(p.name for p in positional)
        self._variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        self._keyword_variadic = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        required = [p for p in parameters if p.default is p.empty and p.kind not in _VARIADIC]
        self._required_keywords = any(p.kind is p.KEYWORD_ONLY for p in required)
        self._least = sum(p.kind in _POSITIONAL for p in required)
        self._most = len(positional)
        self._hints: dict[str, Any] | None = None
        self._result_readers: dict[bool, Read | None] = {}
        self._forms = {True: _Form(self, json=True), False: _Form(self, json=False)}

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise the `TypeError` that calling the function like this would raise."""
        if not kwargs and not self._required_keywords and self._least <= len(args) <= self._most:
            return  # the common call, without the cost of a full binding
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_name(self._fn)}{self._signature}: {error}") from None

    def prepare(self) -> None:
        """Resolve the annotations now, so that a wrong one is an error at the start of a worker.

        Raises:
            ConfigError: An annotation cannot be resolved, or nothing can convert to it.
        """
        for name in self._signature.parameters:
            self._forms[True].read(name)

    def load(self, message: Message, body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decode and convert the arguments of a message.

        Raises:
            DecodeError: An argument is missing, unexpected, or does not fit its annotation.
        """
        if message.pickled is not None:
            args, kwargs = unpickle(message.pickled)
        else:
            args, kwargs = self._forms[is_json(body)].load(message)
        try:
            self.check(args, kwargs)
        except TypeError as error:
            raise DecodeError(str(error)) from None
        return args, kwargs

    def read_result(self, encoded: bytes, json: bool) -> Any:
        """Decode a result, in JSON or MessagePack, into the annotated return type.

        Where nothing can convert to the annotation, or the value does not fit it, the value is
        returned as plain data: the task has run, and this is its value.
        """
        if json not in self._result_readers:
            try:
                self._result_readers[json] = reader(self.hints().get("return", Any), json=json)
            except ConfigError:
                self._result_readers[json] = None
        read = self._result_readers[json]
        if read is not None:
            try:
                return read(encoded)
            except Exception:  # a class of the user may raise anything; see the docstring
                pass
        return decode_plain(encoded, json)

    def hints(self) -> dict[str, Any]:
        """Return the resolved annotations by parameter name."""
        if self._hints is None:
            try:
                self._hints = _hints(self._fn)
            except Exception as error:  # an annotation is an arbitrary expression
                raise ConfigError(
                    f"the annotations of {_name(self._fn)} cannot be resolved: {error}"
                ) from error
        return self._hints

    def at(self, index: int) -> str:
        """Return the name of the parameter that takes the positional argument at `index`."""
        if index < len(self._names):
            return self._names[index]
        if self._variadic is None:
            raise DecodeError(f"takes {len(self._names)} positional arguments but more were given")
        return self._variadic

    def named(self, name: str) -> str:
        """Return the name of the parameter that takes the keyword argument `name`."""
        parameter = self._signature.parameters.get(name)
        if parameter is not None and parameter.kind in _BY_NAME:
            return name
        if self._keyword_variadic is None:
            raise DecodeError(f"got an unexpected keyword argument {name!r}")
        return self._keyword_variadic


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    if not isinstance(fn, MethodType):
        return get_type_hints(fn, include_extras=True)
    # Without the parameter for the task itself: often only type checkers know its annotation.
    own = next(iter(inspect.signature(fn.__func__).parameters))
    others = {name: kind for name, kind in fn.__annotations__.items() if name != own}
    names = getattr(inspect.unwrap(fn.__func__), "__globals__", {})
    return get_type_hints(
        SimpleNamespace(__annotations__=others), globalns=names, include_extras=True
    )


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", repr(fn)))


class _Form:
    """The decoders of the parameters of one function, for one framing of messages."""

    def __init__(self, arguments: Arguments, *, json: bool) -> None:
        self._arguments = arguments
        self._json = json
        self._list: Read = reader(list[Raw], json=json)
        self._map: Read = reader(dict[str, Raw], json=json)
        self._readers: dict[str, Read] = {}
        self._rows: dict[int, Read | None] = {}  # by number of positional arguments
        self._usual: Read | None = None

    def read(self, parameter: str) -> Read:
        found = self._readers.get(parameter)
        if found is None:
            annotation = self._arguments.hints().get(parameter, Any)
            found = self._readers[parameter] = reader(annotation, json=self._json)
        return found

    def load(self, message: Message) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = self._keywords(message.kwargs) if bytes(message.kwargs) else {}
        return (self._row(message.args) if bytes(message.args) else ()), kwargs

    def _row(self, raw: Raw) -> tuple[Any, ...]:
        """Decode all positional arguments in one step, with the decoder that fitted before."""
        if self._usual is not None:
            try:
                return self._usual(raw)  # type: ignore[no-any-return]  # a tuple: see _whole_row
            except Exception:  # any: see _read, which is asked below
                self._usual = None  # another number of arguments, or one that does not fit
        rows: list[Raw] = _read(self._list, raw, "the arguments")
        self._usual = self._whole_row(len(rows))
        names = [self._arguments.at(index) for index in range(len(rows))]
        return tuple(
            _read(self.read(name), item, f"argument {name!r}")
            for name, item in zip(names, rows, strict=True)
        )

    def _whole_row(self, count: int) -> Read | None:
        if count not in self._rows:
            hints = self._arguments.hints()
            kinds = [hints.get(self._arguments.at(index), Any) for index in range(count)]
            if len(self._rows) > _MOST_ROWS:
                return None  # a variadic function called with ever other counts
            try:
                row: Any = tuple
                self._rows[count] = _plain_reader(row[tuple(kinds)], json=self._json)
            except Exception:  # they are decoded one by one, which tells the wrong one
                self._rows[count] = None
        return self._rows[count]

    def _keywords(self, raw: Raw) -> dict[str, Any]:
        items: dict[str, Raw] = _read(self._map, raw, "the keyword arguments")
        return {
            name: _read(self.read(self._arguments.named(name)), item, f"argument {name!r}")
            for name, item in items.items()
        }


_MOST_ROWS = 64


def _read(read: Read, raw: Raw, what: str) -> Any:
    try:
        return read(raw)
    except ValueError as error:  # msgspec's, pydantic's, and of classes that check themselves
        raise DecodeError(f"{what}: {error}") from None
    except Exception as error:  # a class of the user may raise anything
        raise DecodeError(f"{what}: {type(error).__name__} while it was read") from error
