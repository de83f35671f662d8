"""Annotations of a function, resolved one by one.

Each is resolved by itself, so that one that only type checkers can resolve concerns nothing else.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any, ParamSpecArgs, ParamSpecKwargs, TypeVarTuple, Unpack, get_args, get_origin

from aiotaskq.errors import ConfigError


def function_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that a callable calls in the end: that of a method or a wrapper, too."""
    found: Any = fn  # of any type, as a user gave it
    seen: set[int] = set()
    while id(found) not in seen:
        seen.add(id(found))
        inside = getattr(found, "__wrapped__", None)
        if isinstance(found, functools.partial):
            found = found.func
        elif isinstance(found, MethodType):
            found = found.__func__
        elif inside is not None:
            found = inside
        elif not inspect.isroutine(found) and not isinstance(found, type):
            found = type(found).__call__
    return found  # type: ignore[no-any-return]  # it can be called, as what it is in


class Hints:
    """The resolved annotations of a function.

    Args:
        fn: The function, or another callable.
        signature: Its signature.
        task: The name of the task, for errors.
    """

    def __init__(self, fn: Callable[..., Any], signature: inspect.Signature, task: str) -> None:
        function = function_of(fn)
        self._names: dict[str, Any] = getattr(function, "__globals__", {})
        self._type_parameters = {
            one.__name__: one for one in getattr(function, "__type_params__", ())
        }
        self.module = str(getattr(function, "__module__", "")) or "its module"
        self._signature = signature
        self._task = task

    def parameter(self, name: str) -> Any:
        """Return the annotation of a parameter; Any if it has none.

        Raises:
            ConfigError: It cannot be resolved.
        """
        parameter = self._signature.parameters[name]
        if parameter.annotation is parameter.empty:
            return Any
        try:
            hint = self._resolve(parameter.annotation)
        except Exception as error:  # an annotation is an arbitrary expression
            raise ConfigError(
                f"{self.about(name)} is annotated with {_shown(parameter.annotation)}, which cannot"
                f" be resolved ({error}): import its names at the top of {self.module}, outside"
                " `if TYPE_CHECKING`, or leave the annotation out"
            ) from error
        if isinstance(hint, ParamSpecArgs | ParamSpecKwargs | TypeVarTuple):
            return Any
        if parameter.default is None:  # so None may be given, whatever the annotation says
            return hint | None if isinstance(hint, type) else typing.Optional[hint]  # noqa: UP045 - not every hint has the operator
        return hint

    def about(self, name: str) -> str:
        """Return the words for a parameter in an error."""
        return f"parameter {name!r} of the task {self._task} in {self.module}"

    def returned(self) -> Any:
        """Return the annotation of the result; Any if it has none.

        Raises:
            ConfigError: It cannot be resolved: often only type checkers know it.
        """
        annotation = self._signature.return_annotation
        if annotation is self._signature.empty:
            return Any
        try:
            return self._resolve(annotation)
        except Exception as error:  # as above
            raise ConfigError(f"the result of {self._task} cannot be resolved: {error}") from error

    def _resolve(self, annotation: Any) -> Any:
        return typing.get_type_hints(
            SimpleNamespace(__annotations__={"hint": annotation}),
            globalns=self._names,
            localns=self._type_parameters,
            include_extras=True,
        )["hint"]


def is_unpacked(hint: Any) -> bool:
    """Return whether an annotation is ``*X`` or ``Unpack[X]``, and so one of several arguments."""
    return _unpacked(hint) is not None


def items_of_row(hint: Any, count: int) -> list[Any]:
    """Return the annotations of the variadic positional arguments.

    Args:
        hint: The annotation of ``*args``.
        count: The number of arguments.
    """
    inner = _unpacked(hint)
    if inner is None:
        return [hint] * count
    if isinstance(inner, TypeVarTuple) or get_origin(inner) is not tuple:
        return [Any] * count
    items = list(get_args(inner))
    if len(items) == 2 and items[1] is ...:
        return [items[0]] * count
    for place, item in enumerate(items):
        if is_unpacked(item):  # tuple[int, *tuple[str, ...], bool]
            before, after = items[:place][:count], items[place + 1 :]
            rest = count - len(before)
            after = after[max(0, len(after) - rest) :]
            return [*before, *items_of_row(item, rest - len(after)), *after]
    return [*items[:count], *[Any] * (count - len(items))]


def required_of(hint: Any) -> frozenset[str]:
    """Return the keywords that have to be given, if ``**kwargs`` has a TypedDict for them."""
    inner = _unpacked(hint)
    kind = get_origin(inner) or inner
    if not typing.is_typeddict(kind):
        return frozenset()
    # Its own list is wrong where its annotations are texts.
    known: frozenset[str] = kind.__required_keys__
    marks = {
        name: _qualifiers(item)
        for name, item in typing.get_type_hints(kind, include_extras=True).items()
    }
    return frozenset(
        name
        for name, found in marks.items()
        if "Required" in found or (name in known and "NotRequired" not in found)
    )


def keywords_of(hint: Any) -> dict[str, Any] | None:
    """Return the annotations of ``**kwargs`` by name, if it has a TypedDict for them."""
    inner = _unpacked(hint)
    if inner is None or not typing.is_typeddict(get_origin(inner) or inner):
        return None
    kind = get_origin(inner) or inner
    return {
        name: _without_qualifier(item)
        for name, item in typing.get_type_hints(kind, include_extras=True).items()
    }


_QUALIFIERS = ("Required", "NotRequired", "ReadOnly")


def _qualifiers(hint: Any) -> list[str]:
    found = []
    while (name := getattr(get_origin(hint), "_name", "")) in _QUALIFIERS:
        found.append(name)
        (hint,) = get_args(hint)
    return found


def _without_qualifier(hint: Any) -> Any:
    for _ in _qualifiers(hint):
        (hint,) = get_args(hint)
    return hint


def _unpacked(hint: Any) -> Any:
    """Return the type inside ``*X`` or ``Unpack[X]``; None if it is another."""
    if getattr(hint, "__unpacked__", False):
        return get_origin(hint)[get_args(hint)]
    if get_origin(hint) is Unpack or getattr(get_origin(hint), "_name", "") == "Unpack":
        return get_args(hint)[0]
    return None


def _shown(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else repr(annotation)
