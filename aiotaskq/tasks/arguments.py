"""The arguments of a task: checked against its signature, converted to its annotations.

The sender checks that a call fits the signature, and writes each argument so that the worker reads
it as it was (`aiotaskq.encoding.forms`). The worker decodes each argument from the bytes of the
message directly into the annotated type, so that a task never runs with a raw value.

The usual case is fast: all positional arguments are decoded in one step by a decoder of their tuple
of types, the one that fitted the call before. Only where that fails are they decoded one by one,
which tells the argument that is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Raw

from aiotaskq.contract.message import NOTHING, Message
from aiotaskq.encoding.annotations import Read, native_reader
from aiotaskq.encoding.codec import is_json, unpickle
from aiotaskq.encoding.forms import (
    UNKNOWN_FORM,
    Form,
    RefusedForm,
    form_of,
    form_of_result,
)
from aiotaskq.encoding.tags import MARK
from aiotaskq.errors import ConfigError, DecodeError
from aiotaskq.tasks.hints import Hints, is_unpacked, items_of_row, keywords_of, required_of


class Arguments:
    """The parameters of a function; of a method, all but the first.

    Args:
        fn: The function.
        task: The name of its task, for errors.

    Raises:
        ConfigError: The method has no first parameter.
    """

    def __init__(self, fn: Callable[..., Any], task: str = "") -> None:
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
        self._keywords_matter = self._keyword_variadic is not None or any(
            p.kind is p.KEYWORD_ONLY for p in required
        )
        self._least = sum(p.kind in _POSITIONAL for p in required)
        self._most = len(positional)
        self._hints = Hints(fn, self._signature, task or _name(fn))
        self._forms: dict[str, Form] = {}  # by parameter
        self._parts: dict[int, tuple[Any, Form]] = {}  # by id of an annotation inside another one
        self._row_hint: tuple[Any] | None = None  # of the variadic arguments; None: not looked at
        self._plain_rows: set[tuple[type, ...]] = set()
        self._keywords: dict[str, Form] = {}  # by keyword
        self._rows: dict[int, tuple[Form, ...]] = {}  # by number of positional arguments
        self._keyword_hints: tuple[Mapping[str, Any] | None] | None = None  # None: not looked at
        self._result: Form | None = None
        self._loaders = {True: _Loader(self, json=True), False: _Loader(self, json=False)}

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise the `TypeError` that calling the function like this would raise."""
        if not kwargs and not self._keywords_matter and self._least <= len(args) <= self._most:
            return  # the common call, without the cost of a full binding
        try:
            self._signature.bind(*args, **kwargs)
            self._check_keywords(kwargs)
        except TypeError as error:
            raise TypeError(f"{_name(self._fn)}{self._signature}: {error}") from None

    def _check_keywords(self, kwargs: Mapping[str, Any]) -> None:
        """Check the keywords that ``**kwargs: Unpack[...]`` takes, as a type checker would."""
        keywords = self._typed_keywords()
        if keywords is None:
            return
        named = [p.name for p in self._signature.parameters.values() if p.kind in _BY_NAME]
        for name in kwargs:
            if name not in keywords and name not in named:
                raise TypeError(f"got an unexpected keyword argument {name!r}")
        for name in required_of(self._hints.parameter(self._keyword_variadic or "")):
            if name not in kwargs:
                raise TypeError(f"missing a required keyword argument: {name!r}")

    def prepare(self) -> None:
        """Resolve the annotations now, so that a wrong one is an error at the start of a worker.

        Raises:
            ConfigError: An annotation cannot be resolved, or nothing can convert to it. The latter
                is no error for a parameter with a default, which need not be given.
        """
        for name, parameter in self._signature.parameters.items():
            if name == self._variadic:
                forms = [*self._variadic_row(name, 1)]
            elif name == self._keyword_variadic:
                forms = [self.named(keyword) for keyword in self._typed_keywords() or ("",)]
            else:
                forms = [self._form(name)]
            for form in forms:
                if isinstance(form, RefusedForm):
                    form.raise_at_start(is_needed=parameter.default is parameter.empty)

    # Forms

    def are_plain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether all these, written plainly, are certainly read as they were."""
        types = tuple(map(type, args))
        if types not in self._plain_rows:  # the same types are sent again and again
            if not all(k in form.plain for k, form in zip(types, self.row(len(args)), strict=True)):
                return False
            if len(self._plain_rows) < _MOST_ROWS and len(types) <= _LONGEST_ROW:
                self._plain_rows.add(types)
        return not kwargs or all(type(kwargs[name]) in self.named(name).plain for name in kwargs)

    def row(self, count: int) -> Sequence[Form]:
        """Return the forms of the first `count` positional arguments.

        Raises:
            DecodeError: The function takes fewer.
        """
        found = self._rows.get(count)
        if found is None:
            names = self._names[:count]
            found = tuple(self._form(name) for name in names)
            if count > len(names):
                if self._variadic is None:
                    raise DecodeError(
                        f"takes {len(names)} positional arguments but more were given"
                    )
                found += self._variadic_row(self._variadic, count - len(names))
            # A variadic function is called with ever other counts.
            if len(self._rows) < _MOST_ROWS and count <= _LONGEST_ROW:
                self._rows[count] = found
        return found

    def named(self, name: str) -> Form:
        """Return the form of a keyword argument.

        Raises:
            DecodeError: The function does not take it.
        """
        found = self._keywords.get(name)
        if found is None:
            found = self._keyword(name)
            if len(self._keywords) < _MOST_ROWS:
                self._keywords[name] = found
        return found

    def result(self) -> Form:
        """Return the form of the result."""
        if self._result is None:
            try:
                self._result = form_of_result(self._hints.returned())
            except ConfigError:  # often only type checkers know it
                self._result = UNKNOWN_FORM
        return self._result

    def _variadic_row(self, variadic: str, count: int) -> tuple[Form, ...]:
        """Return the forms of the variadic positional arguments."""
        if self._row_hint is None:
            try:
                self._row_hint = (self._hints.parameter(variadic),)
            except ConfigError:  # told by its form
                self._row_hint = (Any,)
        (hint,) = self._row_hint
        if not is_unpacked(hint):  # one for all: anybody may send a million arguments
            return (self._form(variadic),) * count
        return tuple(self._part(variadic, item) for item in items_of_row(hint, count))

    def _keyword(self, name: str) -> Form:
        parameter = self._signature.parameters.get(name)
        if parameter is not None and parameter.kind in _BY_NAME:
            return self._form(name)
        variadic = self._keyword_variadic
        if variadic is None:
            raise DecodeError(f"got an unexpected keyword argument {name!r}")
        keywords = self._typed_keywords()
        if keywords is None:
            return self._form(variadic)
        if name not in keywords:
            raise DecodeError(f"got an unexpected keyword argument {name!r}")
        return self._part(variadic, keywords[name])

    def _typed_keywords(self) -> Mapping[str, Any] | None:
        """Return the annotations of the keywords by name, if a TypedDict has them."""
        if self._keyword_variadic is None:
            return None
        if self._keyword_hints is None:
            try:
                found = keywords_of(self._hints.parameter(self._keyword_variadic))
            except ConfigError:  # told where the parameter is asked for
                found = None
            self._keyword_hints = (found,)
        return self._keyword_hints[0]

    def _form(self, parameter: str) -> Form:
        """Return the form of a parameter."""
        found = self._forms.get(parameter)
        if found is None:
            try:
                hint = self._hints.parameter(parameter)
            except ConfigError as error:
                found = RefusedForm(str(error), is_resolved=False)
            else:
                found = self._made(parameter, hint)
            self._forms[parameter] = found
        return found

    def _part(self, variadic: str, hint: Any) -> Form:
        """Return the form of some of the arguments that a variadic parameter takes."""
        # Not by the annotation, which may not be hashable. Its id is its own while it is kept.
        known = self._parts.get(id(hint))
        if known is None:
            known = self._parts[id(hint)] = hint, self._made(variadic, hint)
        return known[1]

    def _made(self, parameter: str, hint: Any) -> Form:
        try:
            return form_of(hint)
        except ConfigError as error:
            return RefusedForm(f"{self._hints.about(parameter)}: {error}")

    # Reading

    def load(self, message: Message, body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decode and convert the arguments of a message.

        Raises:
            DecodeError: An argument is missing, unexpected, or does not fit its annotation.
        """
        if message.pickled is not None:
            args, kwargs = unpickle(message.pickled)
        else:
            args, kwargs = self._loaders[is_json(body)].load(message)
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
        return (self._result or self.result()).read(encoded, json=json)

    def label(self, index: int) -> str:
        """Return the name of the parameter that takes the positional argument at `index`."""
        return self._names[index] if index < len(self._names) else str(self._variadic)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_MOST_ROWS = 64
_LONGEST_ROW = 256  # arguments of a row that is kept: those of a variadic one may be a million


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", repr(fn)))


class _Loader:
    """The decoders of the arguments of one function, for one framing of messages."""

    def __init__(self, arguments: Arguments, *, json: bool) -> None:
        self._arguments = arguments
        self._json = json
        self._list: Read = native_reader(list[Raw], json=json)
        self._map: Read = native_reader(dict[str, Raw], json=json)
        self._whole: dict[int, Read | None] = {}  # by number of positional arguments
        self._usual: Read | None = None

    def load(self, message: Message) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args = b"" if message.args is NOTHING else bytes(message.args)
        kwargs = b"" if message.kwargs is NOTHING else bytes(message.kwargs)
        return self._row(args) if args else (), self._keywords(kwargs) if kwargs else {}

    def _row(self, raw: bytes) -> tuple[Any, ...]:
        """Decode all positional arguments in one step, with the decoder that fitted before."""
        if self._usual is not None and raw.find(MARK) < 0:
            try:
                return self._usual(raw)  # type: ignore[no-any-return]  # a tuple: see _whole_row
            except Exception:  # any: see _read, which is asked below
                self._usual = None  # another number of arguments, or one that does not fit
        items: list[Raw] = _read(self._list, raw, "the arguments")
        forms = self._arguments.row(len(items))
        self._usual = self._whole_row(forms)
        return tuple(
            self._item(form, item, self._arguments.label(index))
            for index, (form, item) in enumerate(zip(forms, items, strict=True))
        )

    def _whole_row(self, forms: Sequence[Form]) -> Read | None:
        count = len(forms)
        if count > _LONGEST_ROW:
            return None
        if count not in self._whole:
            if len(self._whole) > _MOST_ROWS or not all(form.is_native for form in forms):
                return None
            row: Any = tuple
            try:
                read = native_reader(row[tuple(f.annotation for f in forms)], json=self._json)
            except Exception:  # they are decoded one by one, which tells the wrong one
                read = None
            self._whole[count] = read
        return self._whole[count]

    def _keywords(self, raw: bytes) -> dict[str, Any]:
        items: dict[str, Raw] = _read(self._map, raw, "the keyword arguments")
        named, json = self._arguments.named, self._json
        with suppress(Exception):  # any: see _read, which tells the wrong one
            return {name: named(name).read(bytes(item), json=json) for name, item in items.items()}
        return {name: self._item(named(name), item, name) for name, item in items.items()}

    def _item(self, form: Form, item: Raw, name: str) -> Any:
        return _read(lambda raw: form.read(raw, json=self._json), bytes(item), f"argument {name!r}")


def _read(read: Read, raw: bytes, what: str) -> Any:
    try:
        return read(raw)
    except ValueError as error:  # msgspec's, pydantic's, and of classes that check themselves
        raise DecodeError(f"{what}: {error}") from None
    except Exception as error:  # a class of the user may raise anything
        raise DecodeError(f"{what}: {type(error).__name__} while it was read") from error
