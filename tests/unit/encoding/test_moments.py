"""Moments and binary data arrive as they were: at changes of clocks, and with their offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, timezone
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import AfterValidator, BaseModel

from aiotaskq.encoding.codec import Codec, Serializer
from aiotaskq.encoding.comparison import Comparison, Match
from aiotaskq.encoding.forms import UNTYPED_FORM, form_of, form_of_result
from aiotaskq.errors import EncodeError

FRAMINGS: tuple[Serializer, ...] = ("json", "msgpack")
framings = pytest.mark.parametrize("framing", FRAMINGS)

BERLIN = ZoneInfo("Europe/Berlin")
SUMMER = timezone(timedelta(hours=2))
AT = datetime(2026, 7, 25, 0, 30, tzinfo=SUMMER)
MOMENTS = [
    datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN),
    datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
    datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN),  # which the clocks leave out
    datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN, fold=1),
    datetime(2026, 7, 25, 0, 30, tzinfo=BERLIN),
    datetime.min.replace(tzinfo=SUMMER),
    datetime.max.replace(tzinfo=timezone(timedelta(hours=-2))),
]


@dataclass(frozen=True)
class Visit:
    at: datetime


class Model(BaseModel):
    at: datetime


SHAPES: list[tuple[Any, Callable[[datetime], Any], Callable[[Any], datetime]]] = [
    (datetime, lambda at: at, lambda got: got),
    (datetime | None, lambda at: at, lambda got: got),
    (Any, lambda at: at, lambda got: got),
    (dict[str, datetime], lambda at: {"a": at}, lambda got: got["a"]),
    (Any, lambda at: {"a": [at]}, lambda got: got["a"][0]),
    (Any, lambda at: {at: 1}, lambda got: next(iter(got))),
    (dict[datetime, int], lambda at: {at: 1}, lambda got: next(iter(got))),
    (Any, lambda at: {(1, at)}, lambda got: next(iter(got))[1]),
    (set[datetime], lambda at: {at}, lambda got: next(iter(got))),
    (list[Visit], lambda at: [Visit(at)], lambda got: got[0].at),
    (Model, lambda at: Model(at=at), lambda got: got.at),
    (Model | None, lambda at: Model(at=at), lambda got: got.at),
    (dict[str, Model], lambda at: {"a": Model(at=at)}, lambda got: got["a"].at),
]


@framings
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("at", MOMENTS, ids=repr)
def test_a_moment_arrives_with_its_offset_also_when_a_clock_is_set(
    at: datetime, shape: tuple[Any, Any, Any], framing: Serializer
) -> None:
    annotation, make, find = shape
    for form in (form_of(annotation), form_of_result(annotation)):
        encoded = form.write(make(at), json=framing == "json")
        got = find(form.read(encoded, json=framing == "json"))
        assert got.replace(tzinfo=None) == at.replace(tzinfo=None)
        assert got.utcoffset() == at.utcoffset()


@framings
def test_the_result_of_a_task_is_kept_in_the_hours_in_which_a_clock_is_set(
    framing: Serializer,
) -> None:
    codec = Codec(result_serializer=framing)
    for at in MOMENTS:
        raw = codec.encode_result([at], UNTYPED_FORM)
        assert codec.decode_result(raw)[0].utcoffset() == at.utcoffset()


@framings
@pytest.mark.parametrize("at", MOMENTS[:5], ids=repr)
def test_an_object_in_a_set_arrives_with_the_same_moment(at: datetime, framing: Serializer) -> None:
    form = form_of(set[Visit])
    got = form.read(form.write({Visit(at)}, json=framing == "json"), json=framing == "json")
    assert next(iter(got)).at.astimezone(UTC) == at.astimezone(UTC)


@framings
def test_a_validator_may_put_a_moment_into_another_zone(framing: Serializer) -> None:
    form = form_of(Annotated[datetime, AfterValidator(lambda at: at.astimezone(UTC))])
    for at in (AT, MOMENTS[0]):
        encoded = form.write(at, json=framing == "json")
        got = form.read(encoded, json=framing == "json")
        assert got == at.astimezone(UTC)


@framings
def test_another_moment_is_refused(framing: Serializer) -> None:
    later = Annotated[datetime, AfterValidator(lambda at: at + timedelta(hours=1))]
    with pytest.raises(EncodeError):
        form_of(later).write(MOMENTS[0], json=framing == "json")


def test_moments_are_compared_by_their_instants() -> None:
    first, second = MOMENTS[:2]
    for sent in (first, {first}, {first: 1}, [first], {(first, "a")}, {Visit(first)}):
        assert Comparison(sent, sent).match is Match.SAME
    assert Comparison(first, first.astimezone(UTC)).match is Match.CONVERTED
    assert Comparison({first}, {first.astimezone(UTC)}).match is Match.CONVERTED
    assert Comparison({AT: 1}, {AT.astimezone(UTC): 1}).match is Match.CONVERTED
    assert Comparison(first, second.astimezone(UTC)).match is Match.LOST
    assert Comparison({first}, {second.astimezone(UTC)}).match is Match.LOST
    assert Comparison(first, first.replace(tzinfo=None)).match is Match.LOST


@framings
@pytest.mark.parametrize(
    "at", [time(2, 30, tzinfo=SUMMER), time(2, 30), time(0, 30, tzinfo=SUMMER)], ids=repr
)
@pytest.mark.parametrize("annotation", [Any, time])
def test_a_time_of_day_arrives_with_its_offset(
    annotation: Any, at: time, framing: Serializer
) -> None:
    form = form_of(annotation)
    got = form.read(form.write(at, json=framing == "json"), json=framing == "json")
    assert (got, got.utcoffset()) == (at, at.utcoffset())


@framings
@pytest.mark.parametrize("annotation", [Any, dict[str, Any]])
def test_a_bytearray_inside_a_value_stays_one(annotation: Any, framing: Serializer) -> None:
    form = form_of(annotation)
    value = {"a": [bytearray(b"x"), b"y"], "b": b"z"}
    got = form.read(form.write(value, json=framing == "json"), json=framing == "json")
    assert got == value
    assert list(map(type, got["a"])) == [bytearray, bytes]


def test_messagepack_is_written_plainly_where_it_keeps_all() -> None:
    for value in ({"a": [b"x", "č", 1.5]}, [datetime(2026, 1, 1, tzinfo=UTC)]):
        assert b"__type__" not in UNTYPED_FORM.write(value, json=False)
