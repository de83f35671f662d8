"""Variadic arguments: any number of them costs no more than reading them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, TypedDict, Unpack
from uuid import UUID

import pytest

from aiotaskq.encoding.annotations import native_reader
from aiotaskq.encoding.codec import Codec
from aiotaskq.encoding.forms import Form, form_of
from aiotaskq.errors import DecodeError
from aiotaskq.tasks import arguments as module
from aiotaskq.tasks.arguments import Arguments

THEN = datetime(2026, 1, 1, tzinfo=UTC)
ONE = UUID(int=1)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the annotations for which a form was made."""
    found: list[Any] = []

    def make(annotation: Any) -> Form:
        found.append(annotation)
        return form_of(annotation)

    monkeypatch.setattr(module, "form_of", make)
    return found


def plain(x: int, *rest: datetime) -> None: ...
def places(*rest: *tuple[int, *tuple[UUID, ...], datetime]) -> None: ...


def load(fn: Any, *args: Any) -> tuple[Any, ...]:
    arguments, codec = Arguments(fn), Codec(max_payload=10_000_000)
    row, named, _ = codec.pack(args, {}, arguments)
    assert not bytes(named)
    body = b'{"id":"1","task":"t","args":%s}' % bytes(row)
    return arguments.load(codec.decode_message(body), body)[0]


def test_one_form_is_made_for_all_variadic_arguments(made: list[Any]) -> None:
    arguments = Arguments(plain)
    assert len(arguments.row(2000)) == 2000
    arguments.row(3000)
    assert made == [int, datetime]


def test_a_form_is_made_once_for_each_annotation_in_a_tuple(made: list[Any]) -> None:
    arguments = Arguments(places)
    for count in (2000, 3000, 2):
        assert len(arguments.row(count)) == count
    assert sorted(map(str, made)) == sorted(map(str, [int, UUID, datetime]))
    assert arguments.row(3)[-1] is arguments.row(2000)[-1]


def test_a_form_is_made_once_for_each_keyword_of_a_typed_dict(made: list[Any]) -> None:
    fields = {f"k{number}": int | None for number in range(200)}
    many: Any = TypedDict("many", fields)  # type: ignore[misc]  # mypy wants them written out

    def fn(**options: Any) -> None: ...

    fn.__annotations__["options"] = Unpack[many]
    arguments = Arguments(fn)
    for _ in range(3):
        for number in range(200):
            arguments.named(f"k{number}")
    assert len(made) <= 200


def test_many_arguments_arrive() -> None:
    times = (THEN,) * 3000
    assert load(plain, 1, *times) == (1, *times)
    assert load(places, 1, *[ONE] * 3000, THEN) == (1, *[ONE] * 3000, THEN)


def test_the_wrong_one_of_many_arguments_is_told() -> None:
    body = b'{"id":"1","task":"t","args":[1%s,"x"]}' % (b',"2026-01-01T00:00:00Z"' * 3000)
    with pytest.raises(DecodeError, match="'rest'"):
        Arguments(plain).load(Codec().decode_message(body), body)


def test_only_short_rows_are_kept() -> None:
    arguments = Arguments(plain)
    assert arguments.row(3) is arguments.row(3)
    assert arguments.row(5000) is not arguments.row(5000)


def test_no_decoder_is_made_for_a_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def reader(annotation: Any, *, json: bool) -> Any:
        lengths.append(len(getattr(annotation, "__args__", ())))
        return native_reader(annotation, json=json)

    monkeypatch.setattr(module, "native_reader", reader)
    load(plain, 1, *[THEN] * 3000)
    load(plain, 1, *[THEN] * 20)
    assert max(lengths) == 21
