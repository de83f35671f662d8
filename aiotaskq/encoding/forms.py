"""Forms of values: how a value of a parameter, or the result of a task, is written and read.

A value is written plainly where its reader gets it back as it was: an annotated parameter is
written as JSON has it, ``"2026-01-02"`` for a date. Where the annotation is missing or does not say
which of several types is meant, the tagged form (`aiotaskq.encoding.tags`) keeps the type. Where
that does not come back as it was either, the sender gets an `EncodeError`.

Whether it comes back is not worked out from types but tried: what was written is read, and compared
with the value. That costs a decoding; for the types that certainly come back (`Form.plain`) it is
left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

import msgspec

from aiotaskq.encoding.annotations import (
    PLAIN,
    UNTYPED,
    AnnotatedType,
    Read,
    enums_in,
    members,
    plain_types,
    without_recursion,
)
from aiotaskq.encoding.codec import decode_plain, encode_json, encode_msgpack
from aiotaskq.encoding.comparison import Comparison, Match
from aiotaskq.encoding.tags import MARK, Enums, resolve, tagged
from aiotaskq.errors import ConfigError, EncodeError


class Form:
    """The form of a value without an annotation.

    Attributes:
        plain: The types whose plain form is certainly read as it was.
        is_native: Whether msgspec alone decodes it.
        annotation: The annotation; Any if there is none.
        enums: The enums whose members are told from other values.
    """

    plain: frozenset[type] = PLAIN
    is_native = True
    annotation: Any = Any
    enums: Enums = MappingProxyType({})

    def read(self, encoded: bytes, *, json: bool) -> Any:
        """Return the value that was written.

        Raises:
            ValueError: It is not one of these. A class of the user may raise anything else.
        """
        return decode_plain(encoded, json)

    def write(self, value: Any, *, json: bool) -> bytes:
        """Return a value in JSON or MessagePack, in a form that is read as it was.

        Raises:
            EncodeError: There is none.
        """
        try:  # mostly the plain form is read as it was
            encoded = encode_json(value) if json else encode_msgpack(value)
            got = self.read(encoded, json=json)
            if self.is_read_as(value, got) and (json or _keeps_types(value, encoded)):
                return encoded
        except Exception:  # told below
            pass
        return _Writing(self, value, json=json).result()

    def is_read_as(self, value: Any, got: Any) -> bool:
        """Return whether a value is quickly seen to be the one that was read."""
        return type(got) is type(value) and bool(got == value)

    def is_exact(self, value: Any) -> bool:
        """Return whether a value is of a type that the annotation names beside others."""
        return False

    def fits(self, encoded: bytes, *, json: bool) -> bool:
        """Return whether encoded data are of the annotated type."""
        return True

    def accepts(self, match: Match) -> bool:
        """Return whether a value may arrive with this likeness."""
        return match is Match.SAME

    def advice(self) -> str:
        """Return the advice for a value that does not come back."""
        return "annotate it with its type"


class UnknownForm(Form):
    """The form of a value whose annotation is not known here: that of a task sent by its name.

    Its reader may know more of it than the sender. So an object is written as its fields.
    """

    def write(self, value: Any, *, json: bool) -> bytes:
        return _Writing(self, value, json=json, is_lenient=True).result()


class RefusedForm(Form):
    """The form of a parameter whose annotation cannot be used.

    Args:
        problem: The reason.
        is_resolved: Whether the annotation is known. If not, the reader may know it, so that the
            value is written as one of an unknown annotation.
    """

    is_native = False

    def __init__(self, problem: str, *, is_resolved: bool = True) -> None:
        self._problem = problem
        self._is_resolved = is_resolved
        self.plain = frozenset() if is_resolved else PLAIN

    def read(self, encoded: bytes, *, json: bool) -> Any:
        raise ValueError(self._problem)

    def write(self, value: Any, *, json: bool) -> bytes:
        if self._is_resolved:
            raise EncodeError(self._problem)
        return UNKNOWN_FORM.write(value, json=json)

    def raise_at_start(self, *, is_needed: bool) -> None:
        """Raise a `ConfigError` if a worker must not start with it.

        A parameter that need not be given may have a type to which nothing converts.
        """
        if is_needed or not self._is_resolved:
            raise ConfigError(self._problem)


class TypedForm(Form):
    """The form of a value that has an annotation.

    Args:
        annotation: The annotation.
        is_result: Whether it is that of a result. Where a result does not fit its annotation, it is
            read as if it had none: the task has run, and this is its value.

    Raises:
        ConfigError: Nothing can convert to the annotation.
    """

    def __init__(self, annotation: Any, *, is_result: bool = False) -> None:
        annotation = without_recursion(annotation)
        self._type = AnnotatedType(annotation)
        self.annotation = annotation
        self._is_result = is_result
        self.is_native = self._type.is_native
        self.plain = plain_types(annotation) if self.is_native else frozenset()
        self._exact = members(annotation)
        self.enums = {} if self.is_native else enums_in(annotation)
        self._read_json = self._type.reader(json=True)
        self._read_msgpack: Read | None = None  # of use with that serializer alone

    def read(self, encoded: bytes, *, json: bool) -> Any:
        try:
            return self._convert(encoded, json)
        except Exception:  # a class of the user may raise anything
            if not self._is_result:
                raise
            return decode_plain(encoded, json)  # see the class

    def _convert(self, encoded: bytes, json: bool) -> Any:
        if encoded.find(MARK) >= 0:
            value, has_tags = resolve(_DECODE[json](encoded), self.enums)
            if has_tags:
                return self._type.from_python(value)
        if json:
            return self._read_json(encoded)
        if self._read_msgpack is None:
            self._read_msgpack = self._type.reader(json=False)
        return self._read_msgpack(encoded)

    def fits(self, encoded: bytes, *, json: bool) -> bool:
        try:
            self._convert(encoded, json)
        except Exception:  # a class of the user may raise anything
            return False
        return True

    def is_read_as(self, value: Any, got: Any) -> bool:
        # Of similar types in a union, values may be equal.
        return self.is_native and bool(got == value)

    def is_exact(self, value: Any) -> bool:
        return type(value) in self._exact

    def accepts(self, match: Match) -> bool:
        return match is not Match.LOST

    def advice(self) -> str:
        return "annotate it with the type that is sent, or with a union of all that may be"


class _Writing:
    """The writing of one value."""

    def __init__(self, form: Form, value: Any, *, json: bool, is_lenient: bool = False) -> None:
        self._form = form
        self._value = value
        self._json = json
        self._encode = encode_json if json else encode_msgpack
        self._is_lenient = is_lenient
        self._is_ambiguous = False
        self._problem: EncodeError | None = None  # the first one, which says the most

    def result(self) -> bytes:
        plain = self._plainly()
        match = Match.LOST if plain is None else self._match(plain)
        if plain is not None and match is Match.SAME:
            return plain
        for form in self._tagged():
            if self._is_lenient:
                return form
            other = self._match(form)
            if other is Match.SAME or (other < match and self._form.accepts(other)):
                return form
        if plain is not None and (self._form.accepts(match) or self._is_for_the_reader(plain)):
            return plain
        raise self._problem or EncodeError("it cannot be written")

    def _plainly(self) -> bytes | None:
        try:
            return self._encode(self._value)
        except EncodeError as error:
            self._problem = error
            return None

    def _tagged(self) -> list[bytes]:
        try:
            return [self._encode(form) for form in tagged(self._value, self._form.enums)]
        except EncodeError as error:
            problem = error
        except Exception as error:  # methods of the value may raise anything
            problem = EncodeError(
                f"a value of type {_name(self._value)} has no form: {_text(error)}"
            )
        self._problem = self._problem or problem
        return []

    def _match(self, encoded: bytes) -> Match:
        try:
            got = self._form.read(encoded, json=self._json)
        except Exception as error:  # a class of the user may raise anything
            self._note(f"a value of type {_name(self._value)} would not be read: {_text(error)}")
            return Match.LOST
        try:
            if self._form.is_read_as(self._value, got) and (
                self._json or _keeps_types(self._value, encoded)
            ):
                return Match.SAME
        except Exception:  # its comparison may raise anything, as that of an array does
            pass
        comparison = Comparison(self._value, got)
        match = comparison.match
        if self._form.is_exact(self._value) and type(got) is not type(self._value):
            self._is_ambiguous = True
            match = Match.LOST
        if match is Match.CONVERTED and not self._form.fits(encoded, json=self._json):
            match = Match.LOST  # nothing asks for the conversion
        if not self._form.accepts(match):
            self._note(self._told(comparison, got))
        return match

    def _told(self, comparison: Comparison, got: Any) -> str:
        """Return the words for what would be lost."""
        sent, arrived = comparison.loss or (self._value, got)
        before, after = _name(sent), _name(arrived)
        subject = f"a value of type {before}"
        if comparison.place:
            subject = f"in a value of type {_name(self._value)}, {comparison.place}, {subject},"
        if before == after:
            return (
                f"{subject} would arrive as another value: a validator, an alias or a private"
                " attribute is in its way; send plain data"
            )
        return f"{subject} would arrive as {after}: {self._form.advice()}"

    def _note(self, problem: str) -> None:
        self._problem = self._problem or EncodeError(problem)

    def _is_for_the_reader(self, plain: bytes) -> bool:
        """Return whether a value is plain data that do not fit, so that the worker tells."""
        if type(self._form) is not TypedForm or self._is_ambiguous:
            return False
        try:
            got = decode_plain(plain, self._json)
        except ValueError:
            return False
        return Comparison(self._value, got).match is Match.SAME


_UNSURE = (b"\xd6\xff", b"\xd7\xff", b"\xc7\x0c\xff", b"\xc4", b"\xc5", b"\xc6")
"""The first bytes of the moments and the binary data in MessagePack."""

_KEPT = frozenset({str, int, float, bool, bytes, type(None)})
_ITEMS = (list, tuple, set, frozenset)


def _keeps_types(value: Any, encoded: bytes) -> bool:
    """Return whether MessagePack keeps what two equal values may differ in.

    It has moments without their UTC offset, and one type for bytes and bytearrays. Where it is not
    sure, the answer is no.
    """
    if type(value) is datetime:
        return value.tzinfo is UTC or value.tzinfo is None
    for mark in _UNSURE:
        if encoded.find(mark) >= 0:  # a text may contain it, too
            return _has_only_kept_types(value)
    return True


def _has_only_kept_types(value: Any) -> bool:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        kind = type(part)
        if kind is dict:
            rows: tuple[Any, ...] = (part, part.values())
        elif kind in _ITEMS:
            rows = (part,)
        elif kind in _KEPT or (kind is datetime and part.tzinfo in (None, UTC)):
            continue
        else:
            return False
        for row in rows:
            if not _KEPT.issuperset(map(type, row)):
                waiting.extend(one for one in row if type(one) not in _KEPT)
    return True


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # the class is one of the user
        return type(error).__name__


def _name(value: Any) -> str:
    return type(value).__qualname__


_DECODE = {True: msgspec.json.Decoder().decode, False: msgspec.msgpack.Decoder().decode}

UNTYPED_FORM: Final = Form()
UNKNOWN_FORM: Final = UnknownForm()


class UnknownWriters:
    """The writers of a task that is not registered here."""

    def are_plain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether all these, written plainly, are certainly read as they were."""
        return all(type(value) in PLAIN for value in (*args, *kwargs.values()))

    def row(self, count: int) -> Sequence[Form]:
        """Return those of the first `count` positional arguments."""
        return (UNKNOWN_FORM,) * count

    def named(self, name: str) -> Form:
        """Return that of a keyword argument."""
        return UNKNOWN_FORM


UNKNOWN_WRITERS: Final = UnknownWriters()


def form_of(annotation: Any) -> Form:
    """Return the form of a parameter.

    Raises:
        ConfigError: Nothing can convert to the annotation.
    """
    return UNTYPED_FORM if annotation in UNTYPED else TypedForm(annotation)


def form_of_result(annotation: Any) -> Form:
    """Return the form of a result; where nothing converts to the annotation, it is not known."""
    if annotation in UNTYPED:
        return UNTYPED_FORM
    try:
        return TypedForm(annotation, is_result=True)
    except ConfigError:
        return UNKNOWN_FORM
