"""Any value that is encoded is decoded again, or it is refused with the right error."""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from pydantic import BaseModel

from aiotaskq.contract.message import Message, RetryPolicy
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.encoding.codec import Codec, Serializer
from aiotaskq.encoding.exceptions import describe, rebuild, to_exception
from aiotaskq.errors import CodecError, DecodeError
from aiotaskq.tasks.arguments import Arguments

Framing = Literal["json", "msgpack"]
framings = pytest.mark.parametrize("framing", ["json", "msgpack"])


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Cat:
    name: str
    photo: bytes = b""
    born: date | None = None


@dataclass
class Dog:
    barks: int
    friends: list[Cat] = field(default_factory=list)


class Struct(msgspec.Struct):
    id: UUID
    at: datetime
    parts: dict[str, Decimal]


class Pair(NamedTuple):
    left: int
    right: str


class Model(BaseModel):
    id: UUID
    wait: timedelta
    colours: list[Colour]


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
TIMES = st.datetimes(timezones=st.just(UTC))
# Beyond these days, pydantic and msgspec write other texts than they can read.
DURATIONS = st.timedeltas(timedelta(days=-99_999), timedelta(days=99_999))
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False)
CATS = st.builds(Cat, TEXT, st.binary(max_size=20), st.none() | st.dates())
DOGS = st.builds(Dog, INTEGERS, st.lists(CATS, max_size=3))
STRUCTS = st.builds(Struct, st.uuids(), TIMES, st.dictionaries(TEXT, DECIMALS, max_size=3))
MODELS = st.builds(
    Model,
    id=st.uuids(),
    wait=DURATIONS,
    colours=st.lists(st.sampled_from(Colour), max_size=3),
)

TYPED: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, INTEGERS),
    (float, FLOATS),
    (str, TEXT),
    (bytes, st.binary(max_size=20)),
    (UUID, st.uuids()),
    (datetime, TIMES | st.datetimes()),
    (date, st.dates()),
    (timedelta, DURATIONS),
    (Decimal, DECIMALS),
    (Colour | None, st.none() | st.sampled_from(Colour)),
    (Pair, st.builds(Pair, INTEGERS, TEXT)),
    (Cat, CATS),
    (Struct, STRUCTS),
    (Model, MODELS),
    (Cat | Dog, CATS | DOGS),
    (list[Cat | Dog], st.lists(CATS | DOGS, max_size=3)),
    (dict[int, Model], st.dictionaries(INTEGERS, MODELS, max_size=3)),
    (int | str | list[Pair], INTEGERS | TEXT | st.lists(st.builds(Pair, INTEGERS, TEXT))),
    (set[int], st.sets(INTEGERS, max_size=3)),
]
BY_INDEX = st.integers(0, len(TYPED) - 1)

PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
# With values that no serializer can write.
ANYTHING = st.recursive(
    st.none()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.just(object())
    | st.decimals()
    | st.datetimes()
    # With an offset, the fold says nothing, and is not kept.
    | st.datetimes(timezones=st.just(UTC)).map(lambda moment: moment.replace(fold=0))
    | st.timedeltas()
    | st.dates()
    | st.times()
    | st.uuids()
    | st.frozensets(st.integers() | st.text(), max_size=3)
    | st.just({"__type__": "bytes", "__value__": "x"}),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.floats(), inner, max_size=4)
    ),
    max_leaves=20,
)


def taking(*annotations: Any) -> Callable[..., Any]:
    """Return a function whose parameters p0, p1 ... have these annotations."""
    names = [f"p{number}" for number in range(len(annotations))]
    namespace: dict[str, Any] = {}
    exec(f"def fn({', '.join(names)}): ...", namespace)
    fn: Callable[..., Any] = namespace["fn"]
    fn.__annotations__ = dict(zip(names, annotations, strict=True))
    return fn


@framings
@given(st.data(), st.lists(BY_INDEX, min_size=1, max_size=4))
def test_arguments_arrive_as_they_were(
    framing: Framing, data: st.DataObject, indexes: list[int]
) -> None:
    values = tuple(data.draw(TYPED[index][1]) for index in indexes)
    split = data.draw(st.integers(0, len(values)))
    kwargs = {f"p{number}": values[number] for number in range(split, len(values))}
    arguments = Arguments(taking(*[TYPED[index][0] for index in indexes]))
    codec = Codec(task_serializer=framing)
    args, named, _ = codec.pack(values[:split], kwargs, arguments)
    body = codec.encode_message(Message(id="1", task="t", args=args, kwargs=named))
    for _ in range(2):  # the second call is read by the shape of the first
        assert arguments.load(codec.decode_message(body), body) == (values[:split], kwargs)


@framings
@given(st.data(), BY_INDEX)
def test_results_arrive_as_they_were(framing: Framing, data: st.DataObject, index: int) -> None:
    annotation, values = TYPED[index]
    fn = taking()
    fn.__annotations__ = {"return": annotation}
    value = data.draw(values)
    codec = Codec(result_serializer=framing)
    arguments = Arguments(fn)
    raw = codec.encode_result(value, arguments.result())
    assert codec.decode_result(raw, arguments.read_result) == value


@pytest.mark.parametrize("serializer", ["json", "msgpack", "pickle"])
@given(PLAIN)
def test_plain_values_arrive_as_they_were(serializer: Serializer, value: Any) -> None:
    codec = Codec(result_serializer=serializer, accept=["json", "msgpack", "pickle"])
    assert codec.decode_result(codec.encode_result(value)) == value


@framings
@given(ANYTHING)
def test_any_value_arrives_as_it_was_or_is_refused(framing: Framing, value: Any) -> None:
    codec = Codec(task_serializer=framing, result_serializer=framing)
    arguments = Arguments(taking(Any))
    try:
        args, _, _ = codec.pack((value,), {}, arguments)
        raw = codec.encode_result(value, arguments.result())
    except CodecError:
        return
    body = codec.encode_message(Message(id="1", task="t", args=args))
    ((got,), _) = arguments.load(codec.decode_message(body), body)
    for arrived in (got, codec.decode_result(raw, arguments.read_result)):
        # By its text where NaN is in it; a zone of time becomes its offset.
        assert repr(arrived) == repr(value) or arrived == value


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    try:
        message = Codec().decode_message(body)
        Arguments(taking(int)).load(message, body)
    except DecodeError:
        pass


@given(st.data(), BY_INDEX, PLAIN)
def test_any_value_fits_an_annotation_or_is_refused(
    data: st.DataObject, index: int, value: Any
) -> None:
    codec = Codec()
    args, _, _ = codec.pack((value,), {})
    body = codec.encode_message(Message(id="1", task="t", args=args))
    arguments = Arguments(taking(TYPED[index][0]))
    for _ in range(2):
        with contextlib.suppress(DecodeError):
            arguments.load(codec.decode_message(body), body)


MESSAGES = st.builds(
    Message,
    id=TEXT,
    task=TEXT,
    queue=TEXT,
    priority=st.integers(0, 9),
    attempt=st.integers(1, 100),
    sent_at=FLOATS,
    expires_at=st.none() | FLOATS,
    timeout=st.none() | FLOATS,
    retry=st.none() | st.builds(RetryPolicy, max_attempts=st.integers(1, 99), delay=FLOATS),
    unknown_for=FLOATS,
    headers=st.dictionaries(TEXT, TEXT, max_size=3),
)


@framings
@given(MESSAGES)
def test_messages_arrive_as_they_were(framing: Framing, message: Message) -> None:
    codec = Codec(task_serializer=framing)
    body = codec.encode_message(message)
    read = codec.decode_message(body)
    assert read == message
    assert codec.encode_again(read, body) == body


@given(st.binary(max_size=100), st.sampled_from(TaskStatus))
def test_any_bytes_in_a_store_are_a_failure_and_no_crash(raw: bytes, status: TaskStatus) -> None:
    assert str(to_exception(Outcome(task_id="1", status=status, result=Raw(raw))))


KINDS = st.sampled_from([ValueError, KeyError, OSError, StopIteration, SystemExit, Exception])


@given(KINDS, st.lists(ANYTHING, max_size=4))
def test_any_exception_can_be_described(kind: type[BaseException], args: list[Any]) -> None:
    error = kind(*args)
    raw, traceback = describe(error)
    failure = rebuild(raw, "1", traceback)
    assert failure.exc_type == kind.__name__
    expected = str(error)[:10_000].encode("utf-8", "backslashreplace").decode()
    assert failure.exc_message == expected


@given(st.floats())
def test_a_number_never_becomes_another(number: float) -> None:
    codec = Codec()
    try:
        raw = codec.encode_result([number, None])
    except CodecError:
        assert not math.isfinite(number)
    else:
        assert codec.decode_result(raw) == [number, None]
