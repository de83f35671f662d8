"""Readers of annotated types: functions that convert encoded data into a type.

msgspec converts to most types, directly from the bytes. pydantic, where it is installed, converts
to what msgspec does not know: unions of similar types, classes of its own, constraints and
validators in an annotation. What neither can convert to is a `ConfigError`, before a task of it
runs.
"""

from __future__ import annotations

import collections
import dataclasses
import json as stdlib_json
import re
import types
import typing
from collections import abc
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints
from uuid import UUID

import msgspec
import msgspec.inspect
from msgspec import Raw

from aiotaskq.encoding.reduction import TEXTS, is_model
from aiotaskq.errors import ConfigError

Read: TypeAlias = Callable[[Raw | bytes], Any]
"""Decodes bytes into a value of one type."""

UNTYPED: tuple[Any, ...] = (Any, object)

# --- the parts of an annotation -----------------------------------------------------------------


def parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation, all annotations in it, and those of the fields of its classes."""
    seen: list[Any] = []
    waiting = [annotation]
    while waiting:
        part = waiting.pop()
        if any(part is other for other in seen):
            continue
        seen.append(part)
        yield part
        if get_origin(part) is Literal:
            continue
        if get_origin(part) is Annotated:
            waiting.append(part.__origin__)
        else:
            waiting.extend(arg for arg in get_args(part) if not isinstance(arg, (list, str)))
        waiting.extend(_inside(part))


def _inside(part: Any) -> list[Any]:
    if isinstance(part, typing.NewType):
        return [part.__supertype__]
    if hasattr(part, "__value__"):  # `type X = ...`
        return [part.__value__]
    kind = get_origin(part) or part
    if not isinstance(kind, type) or is_model(kind) or not _has_fields(kind):
        return []
    try:
        return list(fields_in(kind).values())
    except Exception:  # msgspec resolves annotations by itself, and does not need this
        return []


def _has_fields(kind: type) -> bool:
    return (
        dataclasses.is_dataclass(kind)
        or issubclass(kind, msgspec.Struct)
        or typing.is_typeddict(kind)
        or "__attrs_attrs__" in vars(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    )


def fields_in(kind: type) -> dict[str, Any]:
    """Return the annotations of the fields of a class."""
    return get_type_hints(kind, include_extras=True)


def members(annotation: Any) -> frozenset[Any]:
    """Return the types that a union names; empty if it is none."""
    if get_origin(annotation) is Annotated:
        annotation = annotation.__origin__
    if get_origin(annotation) not in (Union, types.UnionType):
        return frozenset()
    return frozenset(get_origin(member) or member for member in get_args(annotation))


def without_recursion(annotation: Any) -> Any:
    """Return a type of JSON data that contains itself as one that does not.

    Such a type says no more than that the data are JSON, which they are. So ``Any`` stands for it
    inside itself. Any other annotation is returned as it is.
    """
    leaves: set[Any] = set()
    found = _expanded(annotation, (), leaves)
    return found if _AGAIN in leaves and leaves <= _JSON else annotation


_AGAIN = object()
_JSON = {_AGAIN, str, int, float, bool, None, type(None), Any, list, dict}


def _expanded(annotation: Any, outer: tuple[Any, ...], leaves: set[Any]) -> Any:
    if isinstance(annotation, typing.ForwardRef) or any(annotation is one for one in outer):
        leaves.add(_AGAIN)
        return Any
    if hasattr(annotation, "__value__"):
        return _expanded(annotation.__value__, (*outer, annotation), leaves)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType, list, dict):
        inner = tuple(_expanded(argument, outer, leaves) for argument in arguments)
        kind: Any = origin
        return Union[inner] if origin in (Union, types.UnionType) else kind[inner]  # noqa: UP007 - of a tuple
    try:
        leaves.add(annotation)
    except TypeError:  # not hashable
        leaves.add(type(annotation))
    return annotation


def enums_in(annotation: Any) -> dict[str, type[Enum]]:
    """Return the enums that an annotation names, by their names."""
    try:
        found = [part for part in parts(annotation) if isinstance(part, type)]
    except Exception:  # the annotations inside a class are arbitrary expressions
        return {}
    return {kind.__qualname__: kind for kind in found if issubclass(kind, Enum)}


# --- pydantic -----------------------------------------------------------------------------------

_FOREIGN = ("pydantic", "annotated_types")


def _needs_pydantic(part: Any) -> bool:
    """Return whether msgspec would silently leave out what a part of an annotation says."""
    if get_origin(part) is Annotated:
        return any(
            type(extra).__module__.split(".")[0] in _FOREIGN
            or hasattr(extra, "__get_pydantic_core_schema__")
            for extra in part.__metadata__
        )
    kind = get_origin(part) or part
    return isinstance(kind, type) and (
        ("__pydantic_validator__" in vars(kind) and not is_model(kind))
        or "__pydantic_config__" in vars(kind)
    )


def _by_name() -> dict[str, Any]:
    """Return the settings by which models are read: by the names of fields, as they are written.

    By their aliases as well, because people write messages too.
    """
    from pydantic import VERSION

    known = tuple(map(int, VERSION.split(".")[:2])) >= (2, 11)
    return {"by_alias": True, "by_name": True} if known else {}


class PydanticType:
    """A type that pydantic converts to.

    Raises:
        ConfigError: pydantic cannot convert to it, or is not installed.
    """

    def __init__(self, annotation: Any, problem: str) -> None:
        try:
            from pydantic import ConfigDict, TypeAdapter
        except ImportError:
            raise ConfigError(
                f"{problem}; `pip install python-aiotaskq[pydantic]` may convert to it, or annotate"
                " the parameter otherwise"
            ) from None
        try:
            # The tuple: pydantic takes no settings for a class, only for what is made of classes.
            # The setting: msgspec wrote the bytes.
            row: Any = tuple
            self._adapter = TypeAdapter(row[annotation], config=ConfigDict(val_json_bytes="base64"))
            if hasattr(self._adapter, "rebuild"):  # from 2.10 on; it resolves what is left
                self._adapter.rebuild(raise_errors=True)
        except Exception as error:  # it may ask the annotated classes, whose code is arbitrary
            raise ConfigError(f"{problem}; annotate the parameter otherwise") from error
        self._settings = _by_name()

    def from_json(self, encoded: bytes) -> Any:
        """Convert JSON."""
        return in_one_line(
            lambda: self._adapter.validate_json(b"[%b]" % encoded, **self._settings)[0]
        )

    def from_python(self, value: Any) -> Any:
        """Convert decoded data in which each value has its own type."""
        return in_one_line(
            lambda: self._adapter.validate_python((value,), strict=False, **self._settings)[0]
        )


def in_one_line(validate: Callable[[], Any]) -> Any:
    """Call a validation of pydantic; its own message has several lines for each field."""
    try:
        return validate()
    except ValueError as error:
        raise ValueError("; ".join(str(error).splitlines())) from error


# --- classes that msgspec does not know ---------------------------------------------------------

_COLLECTIONS: dict[type, tuple[type, Callable[..., Any]]] = {
    collections.deque: (list, collections.deque),
    collections.OrderedDict: (dict, collections.OrderedDict),
    collections.Counter: (dict, collections.Counter),
    abc.Iterable: (list, list),
    abc.Container: (list, list),
    abc.Reversible: (list, list),
    abc.Iterator: (list, iter),
    abc.Generator: (list, lambda items: (item for item in items)),
}
_FACTORIES = (list, dict, set, int, float, str, tuple, frozenset)


_NEVER: tuple[Any, ...] = (type, abc.Callable, abc.Awaitable, abc.Coroutine, abc.AsyncIterable)
"""Classes to which pydantic says that it converts, and no data do."""


class Hook:
    """The conversion to classes that msgspec does not know, as its ``dec_hook``.

    Args:
        python: Whether the data are values of their own types, and not what JSON has.
    """

    def __init__(self, *, python: bool) -> None:
        self._python = python

    def __call__(self, kind: Any, value: Any) -> Any:
        """Convert decoded data.

        Raises:
            ValueError: They do not fit.
        """
        plain = get_origin(kind) or kind
        if isinstance(value, plain) and not get_args(kind):
            return value
        if is_model(plain):
            return self._model(plain, value)
        if issubclass(plain, TEXTS):
            return _from_text(plain, value)
        if plain is re.Pattern:
            return _from_text(re.compile, value)
        if plain in _COLLECTIONS or plain is collections.defaultdict:
            return self._collection(kind, plain, value)
        raise ValueError(f"nothing converts to {plain.__qualname__}")

    @staticmethod
    def knows(kind: Any) -> bool:
        """Return whether it converts to a class."""
        plain = get_origin(kind) or kind
        known = (*TEXTS, re.Pattern, collections.defaultdict)
        return is_model(plain) or plain in _COLLECTIONS or issubclass(plain, known)

    def _model(self, kind: Any, value: Any) -> Any:
        settings = _by_name()
        if self._python:
            return in_one_line(lambda: kind.model_validate(value, strict=False, **settings))
        # As JSON, in which `model_dump(mode="json")` wrote it: a strict model would refuse the text
        # of a date otherwise. Not msgspec's JSON, which has no NaN.
        encoded = stdlib_json.dumps(value)
        return in_one_line(lambda: kind.model_validate_json(encoded, **settings))

    def _collection(self, kind: Any, plain: type, value: Any) -> Any:
        arguments = get_args(kind)
        inner: type
        if plain is collections.defaultdict:
            factory = get_origin(arguments[1]) or arguments[1] if arguments else None
            inner = dict
            make: Callable[..., Any] = partial(
                collections.defaultdict, factory if factory in _FACTORIES else None
            )
        else:
            inner, make = _COLLECTIONS[plain]
        if plain is collections.Counter and arguments:
            arguments = (*arguments, int)
        if inner is list:
            arguments = arguments[:1]  # a generator has more
        items: Any = inner
        if arguments:
            items = items[arguments]
        return make(msgspec.convert(value, items, dec_hook=self, str_keys=True))


def _from_text(make: Callable[[str], Any], value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    try:
        return make(value)
    except ValueError:
        raise
    except Exception as error:  # such as a wrong regular expression, or a zero as denominator
        raise ValueError(f"{value!r}: {error}") from error


FROM_JSON = Hook(python=False)
FROM_PYTHON = Hook(python=True)

# --- readers ------------------------------------------------------------------------------------


class AnnotatedType:
    """A type to which encoded data are converted.

    Attributes:
        is_native: Whether msgspec alone decodes it.

    Raises:
        ConfigError: Nothing here can convert to the annotation.
    """

    def __init__(self, annotation: Any) -> None:
        self.annotation = annotation
        problem = _problem(annotation)
        self.is_native = problem is None
        self._pydantic = None if problem is None else PydanticType(annotation, problem)

    def reader(self, *, json: bool) -> Read:
        """Return the reader of plain JSON or MessagePack, without tagged forms."""
        if self._pydantic is None:
            if json and isinstance(self.annotation, type) and is_model(self.annotation):
                model: Any = self.annotation
                settings = _by_name()
                return lambda raw: in_one_line(
                    lambda: model.model_validate_json(bytes(raw), **settings)
                )
            return native_reader(self.annotation, json=json)
        adapter = self._pydantic
        if json:
            return lambda raw: adapter.from_json(bytes(raw))
        decode = msgspec.msgpack.Decoder().decode
        return lambda raw: adapter.from_python(decode(raw))

    def from_python(self, value: Any) -> Any:
        """Convert decoded data in which each value has its own type."""
        if self._pydantic is not None:
            return self._pydantic.from_python(value)
        return msgspec.convert(value, self.annotation, dec_hook=FROM_PYTHON, str_keys=True)


def native_reader(annotation: Any, *, json: bool) -> Read:
    """Return msgspec's reader of an annotation."""
    module: Any = msgspec.json if json else msgspec.msgpack
    if annotation in UNTYPED:
        return module.Decoder().decode  # type: ignore[no-any-return]  # msgspec's two modules share no type
    return module.Decoder(annotation, dec_hook=FROM_JSON).decode  # type: ignore[no-any-return]  # as above


def _problem(annotation: Any) -> str | None:
    """Return the reason why msgspec cannot convert to an annotation; None: it can.

    Raises:
        ConfigError: Nothing can.
    """
    try:
        native_reader(annotation, json=True)
    except Exception as error:  # the annotations inside a class are arbitrary expressions
        if not isinstance(error, (TypeError, RecursionError)):
            raise ConfigError(f"{annotation!r} cannot be resolved: {error}") from error
        return str(error)
    for part in parts(annotation):
        if _needs_pydantic(part):
            return f"{part!r} says what only pydantic understands"
        if _is_custom(part) and not FROM_JSON.knows(part):
            kind = get_origin(part) or part
            problem = f"nothing converts to {kind.__qualname__}"
            if kind in _NEVER:
                raise ConfigError(f"{problem}; annotate the parameter otherwise")
            return problem
    return None


def _is_custom(part: Any) -> bool:
    """Return whether msgspec asks the hook to convert to a part of an annotation."""
    try:
        return isinstance(msgspec.inspect.type_info(part), msgspec.inspect.CustomType)
    except Exception:  # a part that is no type by itself, such as Unpack
        return False


# --- types whose plain form is certain ----------------------------------------------------------

_SCALARS: dict[Any, frozenset[type]] = {
    int: frozenset({int}),
    str: frozenset({str}),
    bool: frozenset({bool}),
    float: frozenset({float, int}),
    bytes: frozenset({bytes}),
    UUID: frozenset({UUID}),
    None: frozenset({type(None)}),
    type(None): frozenset({type(None)}),
}
_SEQUENCES = {list, set, frozenset}
_NOTHING: frozenset[type] = frozenset()

PLAIN: frozenset[type] = frozenset({int, str, bool, float, type(None)})
"""The types of values that JSON and MessagePack keep by themselves."""


def plain_types(annotation: Any) -> frozenset[type]:
    """Return the types whose instances, written plainly, are certainly read as they were.

    Args:
        annotation: An annotation that msgspec can convert to.
    """
    try:
        return _plain_types(annotation)
    except Exception:  # the annotations inside a class are arbitrary expressions
        return _NOTHING


def _plain_types(annotation: Any, *, inside: bool = False) -> frozenset[type]:
    """Return the same; it may raise anything.

    Args:
        annotation: The annotation.
        inside: Whether it is inside a collection, whose items are not looked at one by one: an
            instance of a subclass would go unnoticed.
    """
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain_types(arguments[0], inside=inside)
    if origin is Literal:
        return frozenset(map(type, arguments))
    if origin in (Union, types.UnionType):
        members = [_plain_types(argument, inside=inside) for argument in arguments]
        return frozenset().union(*members) if all(members) else _NOTHING
    if origin in _SEQUENCES and _plain_types(arguments[0], inside=True):
        return frozenset({origin})
    if origin is tuple:
        items = [item for item in arguments if item is not ...]
        return frozenset({tuple}) if all(_plain_types(i, inside=True) for i in items) else _NOTHING
    if (
        origin is dict
        and arguments[0] in (str, int, UUID)
        and _plain_types(arguments[1], inside=True)
    ):
        return frozenset({dict})
    if isinstance(annotation, type):
        if issubclass(annotation, Enum):
            return frozenset({annotation})
        return _NOTHING if inside else _plain_class(annotation)
    return _NOTHING


def _plain_class(kind: type) -> frozenset[type]:
    """Return the class itself, if its fields are plain and reading it calls no code of the user."""
    is_struct = issubclass(kind, msgspec.Struct)
    if not (is_struct or dataclasses.is_dataclass(kind)) or hasattr(kind, "__post_init__"):
        return _NOTHING
    if getattr(kind, "__parameters__", ()):
        return _NOTHING
    if not is_struct:
        fields = dataclasses.fields(kind)
        if any(not field.init or _is_odd_default(field, kind) for field in fields):
            return _NOTHING
    hints = fields_in(kind)
    return (
        frozenset({kind}) if all(_plain_types(h, inside=True) for h in hints.values()) else _NOTHING
    )


def _is_odd_default(field: Any, kind: type) -> bool:
    """Return whether a field may be None against its annotation."""
    return field.default is None and type(None) not in _plain_types(fields_in(kind)[field.name])
