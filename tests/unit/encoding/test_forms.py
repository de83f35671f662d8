"""Values arrive as they were sent, or the sender hears of it: as arguments and as results."""

from __future__ import annotations

import enum
import ipaddress
import json
import math
import re
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, Union
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic.dataclasses
import pytest
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    IPvAnyAddress,
    Json,
    PositiveInt,
    PrivateAttr,
    RootModel,
    SecretBytes,
    SecretStr,
    SerializeAsAny,
    computed_field,
    field_serializer,
    field_validator,
)
from pydantic.alias_generators import to_camel

from aiotaskq.contract.message import Message
from aiotaskq.encoding.codec import Codec, Serializer
from aiotaskq.encoding.forms import UNKNOWN_WRITERS
from aiotaskq.errors import ConfigError, DecodeError, EncodeError
from aiotaskq.tasks.arguments import Arguments

FRAMINGS: tuple[Serializer, ...] = ("json", "msgpack")
framings = pytest.mark.parametrize("framing", FRAMINGS)

U = "00000000-0000-0000-0000-000000000001"
LOCAL_TIME = timezone(timedelta(minutes=19, seconds=32))  # of Amsterdam, until 1937


def taking(annotation: Any) -> Callable[[Any], Any]:
    def fn(x: Any) -> Any:
        return x

    fn.__annotations__ = {} if annotation is None else {"x": annotation, "return": annotation}
    return fn


def sent(annotation: Any, value: Any, framing: Serializer = "json") -> Any:
    """Send a value as an argument, and return the one that the worker gets."""
    codec, arguments = Codec(task_serializer=framing), Arguments(taking(annotation), "t")
    arguments.prepare()
    args, kwargs, _ = codec.pack((value,), {}, arguments)
    body = codec.encode_message(Message(id="1", task="t", args=args, kwargs=kwargs))
    message = codec.decode_message(body)
    ((first,), _), ((got,), _) = arguments.load(message, body), arguments.load(message, body)
    assert type(first) is type(got)  # read in one step, and one by one
    _, kwargs, _ = codec.pack((), {"x": value}, arguments)
    body = codec.encode_message(Message(id="1", task="t", kwargs=kwargs))
    assert type(arguments.load(codec.decode_message(body), body)[1]["x"]) is type(got)
    return got


def returned(annotation: Any, value: Any, framing: Serializer = "json") -> Any:
    """Return a value from a task, and return the one that the caller gets."""
    codec, arguments = Codec(result_serializer=framing), Arguments(taking(annotation), "t")
    raw = codec.encode_result(value, arguments.result())
    json.loads(bytes(raw))
    return codec.decode_result(raw, arguments.read_result)


def written(annotation: Any, value: Any) -> Any:
    """Return a value as it rests in a store."""
    args, _, _ = Codec().pack((value,), {}, Arguments(taking(annotation)))
    return json.loads(bytes(args))[0]


def assert_arrives(annotation: Any, value: Any, framing: Serializer) -> None:
    for way in (sent, returned):
        got = way(annotation, value, framing)
        assert got == value, way
        assert type(got) is type(value), way


def assert_refused(annotation: Any, value: Any, framing: Serializer, match: str = "[a-z]") -> None:
    for way in (sent, returned):
        with pytest.raises(EncodeError, match=match):
            way(annotation, value, framing)


# --- without an annotation ----------------------------------------------------------------------

UNTYPED: list[Any] = [
    datetime(2026, 1, 2, 3, 4, 5, 6),
    datetime(2026, 1, 2, tzinfo=UTC),
    datetime(1900, 1, 1, tzinfo=LOCAL_TIME),
    datetime(2026, 6, 1, tzinfo=ZoneInfo("Europe/Oslo")),
    date(2026, 1, 2),
    time(1, 2, 3),
    timedelta(1, 2, 3),
    timedelta.max,
    UUID(int=1),
    Decimal("1.10"),
    b"test",
    b"\xff\x00",
    bytearray(b"x"),
    {1, 2},
    frozenset({"a"}),
    (1, "a"),
    (),
    1j,
    deque([1]),
    Fraction(1, 3),
    Path("/a"),
    PurePosixPath("b"),
    ipaddress.ip_address("10.0.0.1"),
    ipaddress.ip_network("10.0.0.0/8"),
    ZoneInfo("Europe/Oslo"),
    math.inf,
    -0.0,
    2**70,
    -(2**20_000),
    "a\0b",
    "\ud800",
    {1: "a"},
    {"1": 1, 1: 2},
    {date(2026, 1, 1): 1, (1, 2): 2, None: 3, True: 4, 1.5: 5},
    {"__type__": "bytes", "__value__": "x"},
    {"__type__": "dict", "__value__": []},
    {"__type__": 1},
    ["__type__", {"__value__": 1}],
    {"a": [{"b": (1, {datetime(2026, 1, 1)})}]},
    [1, 1.0, True, None, "x", {}],
]


@framings
@pytest.mark.parametrize("value", UNTYPED, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("annotation", [None, Any, object])
def test_a_value_without_an_annotation_arrives_as_it_was(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    assert_arrives(annotation, value, framing)


@framings
def test_not_a_number_arrives(framing: Serializer) -> None:
    for annotation in (None, float):
        assert math.isnan(sent(annotation, math.nan, framing))
        assert math.isnan(returned(annotation, math.nan, framing))
    assert math.isnan(sent(list[float], [1.0, math.nan], framing)[1])


@framings
@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (dict, {1: datetime(2026, 1, 1)}),
        (list, [(1,), b"x"]),
        (tuple, (1, UUID(int=1))),
        (dict[str, Any], {"a": {Decimal("1.0")}}),
        (list[Any], [{1: 2}]),
        (TypeVar("T"), datetime(2026, 1, 1)),
    ],
)
def test_a_value_inside_an_annotation_that_leaves_it_open_arrives_as_it_was(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    assert_arrives(annotation, value, framing)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (datetime(2026, 1, 2), {"__type__": "datetime", "__value__": "2026-01-02T00:00:00"}),
        (UUID(int=1), {"__type__": "uuid", "__value__": U}),
        (b"text", {"__type__": "bytes", "__value__": "text"}),
        ({1: 2}, {"__type__": "dict", "__value__": [[1, 2]]}),
        ({"a": (1,)}, {"a": {"__type__": "tuple", "__value__": [1]}}),
        ({"a": [1, "x", None]}, {"a": [1, "x", None]}),
    ],
)
def test_a_tagged_form_can_be_read_by_people(value: Any, form: Any) -> None:
    assert written(None, value) == form


class Safe(str):
    """A text that its framework marks."""


class Whole(int): ...


class Real(float): ...


class Row(dict[str, int]): ...


class Pair(NamedTuple):
    left: int
    right: int


class Mark(enum.StrEnum):
    GOOD = "good"


@framings
@pytest.mark.parametrize(
    ("value", "base"),
    [
        (Safe("x"), "x"),
        ({Safe("k"): [Safe("v")]}, {"k": ["v"]}),
        (Whole(3), 3),
        (Real(1.5), 1.5),
        (Row(a=1), {"a": 1}),
        (Pair(1, 2), (1, 2)),
        (Mark.GOOD, "good"),
        (OrderedDict(a=1), {"a": 1}),
        (memoryview(b"x"), b"x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_subclass_of_a_builtin_type_arrives_as_its_base_value(
    value: Any, base: Any, framing: Serializer
) -> None:
    for way in (sent, returned):
        got = way(None, value, framing)
        assert got == base
        assert type(got) is type(base)


@pytest.mark.parametrize(
    ("annotation", "value"), [(str, Safe("x")), (int, Whole(3)), (float, Real(1))]
)
def test_a_subclass_of_a_builtin_type_fits_its_base(annotation: Any, value: Any) -> None:
    assert type(sent(annotation, value)) is annotation
    assert type(returned(annotation, value)) is annotation


class Scalar:
    """A scalar as numpy has them."""

    def __init__(self, value: Any, kind: str) -> None:
        self.value, self.dtype = value, SimpleNamespace(kind=kind)

    def item(self) -> Any:
        return self.value

    def __eq__(self, other: object) -> bool:
        return bool(self.value == other)

    __hash__ = None  # type: ignore[assignment]  # as the values of an array


@framings
def test_scalars_of_numpy_arrive_as_numbers(
    framing: Serializer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace(generic=Scalar))
    for number, kind in ((5, "i"), (1.5, "f"), (True, "b"), (1j, "c")):
        got = sent(None, [Scalar(number, kind)], framing)
        assert got == [number]
        assert type(got[0]) is type(number)
    assert returned(int, Scalar(5, "i"), framing) == 5
    # The item of a time is a number of some unit.
    assert_refused(None, Scalar(5, "M"), framing, "Scalar")


@dataclass
class Point:
    x: int
    y: float | None = None


@dataclass
class Point3(Point):
    z: int = 0


class Colour(enum.Enum):
    RED = "red"


class Struct(msgspec.Struct):
    a: int = 0


class LargerStruct(Struct):
    b: int = 0


class User(BaseModel):
    user_name: str = Field(alias="userName")


ANNA = User(userName="Anna")


@framings
@pytest.mark.parametrize(
    "value",
    [
        Point(1),
        {"a": Point(1)},
        Colour.RED,
        Struct(1),
        ANNA,
        [ANNA],
        re.compile("a"),
        object(),
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("annotation", [None, dict[str, Any] | list[Any] | int])
def test_an_object_without_an_annotation_is_refused_at_the_sender(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    assert_refused(annotation, value, framing)


def test_the_refusal_names_the_place_and_the_mend() -> None:
    with pytest.raises(
        EncodeError, match=r"argument 1: in .* dict, \['a'\]\[0\], .*Point.* as dict: annotate"
    ):
        sent(None, {"a": [Point(1)]})
    with pytest.raises(EncodeError, match=r"Point3 would arrive as Point: annotate.*union"):
        sent(Point, Point3(1))


@framings
def test_a_task_that_is_not_known_here_gets_tagged_values_and_objects_as_their_fields(
    framing: Serializer,
) -> None:
    codec = Codec(task_serializer=framing)
    value = [datetime(2026, 1, 1), Point(1), ANNA]
    args, _, _ = codec.pack((value,), {}, UNKNOWN_WRITERS)
    body = codec.encode_message(Message(id="1", task="t", args=args))
    message = codec.decode_message(body)
    got = Arguments(taking(None)).load(message, body)[0]
    assert got == ([value[0], {"x": 1, "y": None}, {"user_name": "Anna"}],)
    typed = Arguments(taking(tuple[datetime, Point, User]))
    assert typed.load(message, body)[0] == (tuple(value),)


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (datetime, b'"2026-01-02T03:04:05"', datetime(2026, 1, 2, 3, 4, 5)),
        (None, b'"2026-01-02T03:04:05"', "2026-01-02T03:04:05"),
        (bytes | str, b'"test"', b"\xb5\xeb-"),
        (User, b'{"user_name":"a"}', User(userName="a")),
        (User, b'{"userName":"a"}', User(userName="a")),
        (None, b'{"__type__":"new","__value__":1}', {"__type__": "new", "__value__": 1}),
    ],
)
def test_messages_of_earlier_senders_are_read_as_before(
    annotation: Any, text: bytes, value: Any
) -> None:
    body = b'{"id":"1","task":"t","args":[' + text + b"]}"
    assert Arguments(taking(annotation)).load(Codec().decode_message(body), body)[0] == (value,)


@pytest.mark.parametrize(
    "form",
    [
        b'{"__type__":"datetime","__value__":5}',
        b'{"__type__":"decimal","__value__":[]}',
        b'{"__type__":"base64","__value__":"%"}',
        b'{"__type__":"set","__value__":[[]]}',
        b'{"__type__":"dict","__value__":[1]}',
        b'{"__type__":"dict","__value__":[[{},1]]}',
        b'{"__type__":"tuple","__value__":"abc"}',
        b'{"__type__":"fraction","__value__":"1e999999999"}',
        b'{"__type__":"fraction","__value__":"1/0"}',
        b'{"__type__":"zoneinfo","__value__":"../../etc/passwd"}',
        b'{"__type__":"timedelta","__value__":[1e300]}',
        b'{"__type__":"int","__value__":"' + b"9" * 10_000 + b'"}',
    ],
    ids=lambda form: form[:60].decode(),
)
@pytest.mark.parametrize("annotation", [None, datetime, list[Point]])
def test_a_forged_tag_is_a_decode_error(annotation: Any, form: bytes) -> None:
    body = b'{"id":"1","task":"t","args":[' + form + b"]}"
    with pytest.raises(DecodeError, match="'x'"):
        Arguments(taking(annotation)).load(Codec().decode_message(body), body)


# --- unions -------------------------------------------------------------------------------------

UNIONS: list[tuple[Any, list[Any]]] = [
    (bytes | str, ["test", b"test", b"\xff", "dGVzdA=="]),
    (str | bytes, ["test", b"test"]),
    (bytes | str | None, ["test", b"test", None]),
    (list[bytes | str], [["test", b"test"]]),
    (str | datetime, ["2026-01-01T00:00:00", datetime(2026, 1, 1, tzinfo=UTC)]),
    (datetime | str, ["2026-01-01T00:00:00", "x", datetime(2026, 1, 1)]),
    (UUID | str, [U, "x", UUID(int=1)]),
    (dict[str, UUID | str], [{"a": U, "b": UUID(int=1)}]),
    (Decimal | str, ["1.5", Decimal("1.5")]),
    (Decimal | float, [1.5, Decimal("1.5")]),
    (Decimal | int, [5, Decimal(5)]),
    (date | datetime, [date(2026, 1, 1), datetime(2026, 1, 1)]),
    (timedelta | float, [1.5, timedelta(1)]),
    (datetime | int, [5, datetime(2026, 1, 1)]),
    (Path | str, ["/a", Path("/a")]),
    (float | int, [1, 1.0]),
    (int | bool, [1, True]),
    (Mark | str, ["good", Mark.GOOD, "x"]),
    (Colour | str, ["red", Colour.RED]),
    (list[int] | set[int], [[1], {1}]),
    (tuple[int, ...] | list[int], [[1], (1,)]),
    (Point | Point3, [Point(1), Point3(1, 2.0, 3)]),
    (dict[Any, Any] | list[Any], [{1: 2}, [(1,)]]),
]


@framings
@pytest.mark.parametrize(
    ("annotation", "value"),
    [(annotation, value) for annotation, values in UNIONS for value in values],
    ids=repr,
)
def test_a_value_of_a_union_arrives_as_the_type_that_it_has(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    assert_arrives(annotation, value, framing)


@framings
def test_a_dict_that_would_become_an_object_of_a_union_is_refused(framing: Serializer) -> None:
    assert_refused(
        Point | dict[str, Any], {"x": 1, "y": None}, framing, "dict would arrive as Point"
    )


# --- pydantic -----------------------------------------------------------------------------------


class Choices(BaseModel):
    a: int = Field(validation_alias=AliasChoices("x", AliasPath("y", 0)), serialization_alias="z")


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")
    first_name: str
    at_time: datetime

    @computed_field  # type: ignore[prop-decorator]  # pydantic's documentation has it so
    @property
    def loud(self) -> str:
        return self.first_name.upper()


class Secret(BaseModel):
    password: SecretStr
    key: SecretBytes = SecretBytes(b"\xff")
    until: date | None = None


class Hidden(BaseModel):
    a: int
    inner: str = Field(exclude=True)


class Nested(BaseModel):
    data: Json[list[int]]


class Private(BaseModel):
    a: int
    _doubled: int = PrivateAttr(default=0)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def model_post_init(self, _: Any) -> None:
        self._doubled = 2 * self.a


class Pet(BaseModel):
    name: str


class Dog(Pet):
    barks: int = 0


class Home(BaseModel):
    pet: Pet


class AnyHome(BaseModel):
    pet: SerializeAsAny[Pet]


T = TypeVar("T")


class Box(BaseModel, Generic[T]):
    item: T


class Numbers(RootModel[list[int]]): ...


class ByKind(BaseModel):
    shape: Circle | Square = Field(discriminator="kind")


class Circle(BaseModel):
    kind: Literal["circle"] = "circle"
    r: int = 0


class Square(BaseModel):
    kind: Literal["square"] = "square"
    a: int = 0


class Blob(BaseModel):
    data: bytes
    either: bytes | str
    anything: Any = None


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    day: date
    colour: Colour
    secret: SecretStr
    pair: tuple[int, ...]


class German(BaseModel):
    day: date

    @field_serializer("day")
    def show(self, value: date) -> str:
        return value.strftime("%d.%m.%Y")


class Hashed(BaseModel):
    password: str

    @field_validator("password")
    @classmethod
    def hash(cls, value: str) -> str:
        return f"hash of {value}"


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Tree(BaseModel):
    name: str
    children: list[Tree] = []


class Site(BaseModel):
    url: HttpUrl
    address: IPvAnyAddress
    counts: Counter[str]
    last: deque[int]
    point: Point
    pattern: re.Pattern[str]


@pydantic.dataclasses.dataclass
class Item:
    count: PositiveInt
    name: str = Field(default="x", alias="itemName")


@dataclass
class Order:
    user: User
    token: SecretStr


class Line(TypedDict):
    user: User
    at: datetime


MODELS: list[tuple[Any, Any]] = [
    (User, ANNA),
    (User | None, ANNA),
    (list[User], [ANNA]),
    (dict[str, User], {"a": ANNA}),
    (Order, Order(ANNA, SecretStr("s"))),
    (Line, {"user": ANNA, "at": datetime(2026, 1, 1)}),
    (Choices, Choices.model_validate({"x": 1})),
    (Camel, Camel.model_validate({"firstName": "a", "atTime": "2026-01-01T00:00:00Z"})),
    (Secret, Secret(password=SecretStr("pw"), until=date(2026, 1, 1))),
    (SecretStr, SecretStr("pw")),
    (SecretBytes, SecretBytes(b"\xff")),
    (Hidden, Hidden(a=1, inner="x")),
    (Nested, Nested.model_validate({"data": "[1]"})),
    (Dog | Pet, Dog(name="Rex", barks=3)),
    (Pet | Dog, Pet(name="Tom")),
    (Home, Home(pet=Pet(name="Tom"))),
    (Box[datetime], Box[datetime](item=datetime(2026, 1, 1))),
    (Box[int], Box[int](item=1)),
    (Numbers, Numbers([1, 2])),
    (list[Numbers], [Numbers([1])]),
    (ByKind, ByKind(shape=Square(a=2))),
    (Annotated[Circle | Square, Field(discriminator="kind")], Square(a=2)),
    (Blob, Blob(data=b"x", either="test")),
    (Blob, Blob(data=b"\xff", either=b"test", anything={1: datetime(2026, 1, 1)})),
    (Strict, Strict(day=date(2026, 1, 1), colour=Colour.RED, secret=SecretStr("x"), pair=(1, 2))),
    (German, German(day=date(2026, 1, 2))),
    (Open, Open(a=1, b=2)),  # type: ignore[call-arg]  # it allows more
    (Tree, Tree(name="a", children=[Tree(name="b")])),
    (
        Site,
        Site(
            url=HttpUrl("http://a/b"),
            address=ipaddress.ip_address("::1"),
            counts=Counter("aab"),
            last=deque([1]),
            point=Point(1),
            pattern=re.compile("a+"),
        ),
    ),
    (Item, Item(count=1, itemName="y")),
]


@framings
@pytest.mark.parametrize(("annotation", "value"), MODELS, ids=repr)
def test_a_model_arrives_as_it_was(annotation: Any, value: Any, framing: Serializer) -> None:
    assert_arrives(annotation, value, framing)


@framings
def test_a_private_attribute_may_come_anew_or_the_sender_hears_of_it(framing: Serializer) -> None:
    assert sent(Private, Private(a=2), framing)._doubled == 4
    changed = Private(a=2)
    changed._doubled = 5
    assert_refused(Private, changed, framing, r"\._doubled")


@framings
@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Pet, Dog(name="Rex")),
        (list[Pet], [Dog(name="Rex")]),
        (Home, Home(pet=Dog(name="Rex"))),
        (AnyHome, AnyHome(pet=Dog(name="Rex"))),
        (Point, Point3(1)),
        (list[Point], [Point3(1)]),
        (Struct, LargerStruct(1)),
        (dict[str, Struct], {"a": LargerStruct(1)}),
        (Hashed, Hashed(password="x")),
        (date, datetime(2026, 1, 1, 5)),
    ],
    ids=repr,
)
def test_a_value_that_would_be_cut_or_changed_is_refused_at_the_sender(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    with pytest.raises(EncodeError):
        sent(annotation, value, framing)


@pytest.mark.parametrize(
    ("annotation", "data", "value"),
    [
        (User, {"userName": "a"}, User(userName="a")),
        (User, {"user_name": "a"}, User(userName="a")),
        (Point, {"x": 1}, Point(1)),
        (datetime, "2026-01-01T00:00:00", datetime(2026, 1, 1)),
        (UUID | None, U, UUID(int=1)),
        (Annotated[str, AfterValidator(str.lower)], "ABC", "abc"),
        (Sequence[int], (1, 2), [1, 2]),
        (list[User], [{"user_name": "a"}], [User(userName="a")]),
    ],
)
def test_plain_data_are_converted_as_the_annotation_says(
    annotation: Any, data: Any, value: Any
) -> None:
    assert sent(annotation, data) == value


# --- types --------------------------------------------------------------------------------------


class Step(enum.Enum):
    FIRST = (1, 2)


class Tagged(msgspec.Struct, tag="t", rename="camel"):
    at_time: datetime
    any_thing: Any = None


@attrs.define
class Attributes:
    x: int
    at: datetime


TYPES: list[tuple[Any, Any]] = [
    (Iterable[int], [1, 2]),
    (Mapping[str, UUID], {"a": UUID(int=1)}),
    (Counter[str], Counter("aab")),
    (Counter[int], Counter([1])),
    (defaultdict[str, list[int]], defaultdict(list, {"a": [1]})),
    (deque[UUID], deque([UUID(int=1)])),
    (deque, deque([1])),
    (OrderedDict[int, UUID], OrderedDict({1: UUID(int=1)})),
    (AwareDatetime, datetime(2026, 1, 1, tzinfo=UTC)),
    (HttpUrl, HttpUrl("http://a.b/c")),
    (HttpUrl | None, None),
    (dict[str, HttpUrl], {"a": HttpUrl("http://a.b/c")}),
    (IPvAnyAddress, ipaddress.ip_address("::1")),
    (ipaddress.IPv4Address, ipaddress.ip_address("1.2.3.4")),
    (Fraction, Fraction(1, 3)),
    (complex, 1 + 2j),
    (re.Pattern, re.compile("a+")),
    (ZoneInfo, ZoneInfo("Europe/Oslo")),
    (Step, Step.FIRST),
    (list[Step], [Step.FIRST]),
    (Step | None, None),
    (Colour, Colour.RED),
    (dict[Colour, int], {Colour.RED: 1}),
    (PositiveInt, 1),
    (datetime, datetime(1900, 1, 1, tzinfo=LOCAL_TIME)),
    (list[datetime], [datetime(1900, 1, 1, tzinfo=LOCAL_TIME)]),
    (time, time(1, tzinfo=LOCAL_TIME)),
    (timedelta, timedelta.max),
    (int, 2**70),
    (float, math.inf),
    (Point, Point(1, math.inf)),
    (str, "a\0b"),
    (str, "\ud800"),
    (Tagged, Tagged(datetime(1900, 1, 1, tzinfo=LOCAL_TIME), b"x")),
    (Attributes, Attributes(1, datetime(2026, 1, 1))),
    (Pair, Pair(1, 2)),
    (dict[bool, int], {True: 1}),
    (dict[tuple[int, int], int], {(1, 2): 3}),
    (dict[float, int], {1.5: 1}),
    (Annotated[int, "a comment"], 1),
]


@framings
@pytest.mark.parametrize(("annotation", "value"), TYPES, ids=lambda x: repr(x)[:50])
def test_a_value_of_a_type_arrives_as_it_was(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    assert_arrives(annotation, value, framing)


def test_an_iterator_is_one() -> None:
    for annotation in (Iterator[int], Generator[int, None, None]):
        assert next(sent(annotation, [5])) == 5


def test_the_factory_of_a_defaultdict_comes_from_its_annotation() -> None:
    got = sent(defaultdict[str, list[int]], {"a": [1]})
    assert got["b"] == []


@pytest.mark.parametrize(
    ("annotation", "wrong"),
    [
        (PositiveInt, 0),
        (Annotated[int, Field(gt=0)], -1),
        (list[PositiveInt], [0]),
        (dict[str, PositiveInt], {"a": 0}),
        (Item, {"count": 0}),
        (AwareDatetime, "2026-01-01T00:00:00"),
        (Counter[str], {"a": "x"}),
        (Fraction, "1/0"),
        (re.Pattern, "("),
        (deque[int], ["x"]),
    ],
    ids=repr,
)
def test_a_constraint_has_its_effect(annotation: Any, wrong: Any) -> None:
    with pytest.raises(DecodeError, match="'x'"):
        sent(annotation, wrong)


@pytest.mark.parametrize("annotation", [Callable[[], None], type, range, threading.Lock])
def test_a_type_to_which_nothing_converts_is_refused_at_the_start(annotation: Any) -> None:
    with pytest.raises(ConfigError, match=r"parameter 'x' of the task t in .*test_forms"):
        Arguments(taking(annotation), "t").prepare()


def test_without_pydantic_a_constraint_is_refused_and_not_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ConfigError, match=r"\[pydantic\]"):
        Arguments(taking(Annotated[int, Field(gt=0)]), "t").prepare()
    Arguments(taking(Counter[str]), "t").prepare()


def test_a_parameter_that_need_not_be_given_may_have_any_type() -> None:
    def fn(x: int, lock: range = range(1)) -> None: ...

    arguments = Arguments(fn, "t")
    arguments.prepare()
    assert bytes(Codec().pack((1,), {}, arguments)[0]) == b"[1]"
    with pytest.raises(EncodeError, match="'lock'"):
        Codec().pack((1, range(3)), {}, arguments)


OldJson = Union[dict[str, "OldJson"], list["OldJson"], str, int, None]  # noqa: UP007 - as old code has it


@framings
def test_a_type_of_json_that_contains_itself_is_one(framing: Serializer) -> None:
    assert_arrives(OldJson, {"a": [1, {"b": None}]}, framing)


@dataclass
class Odd:
    """A class whose instances are equal to nothing."""

    values: list[float] = field(default_factory=list)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]  # it is not equal to itself


@framings
def test_a_class_whose_comparison_raises_arrives(framing: Serializer) -> None:
    assert sent(Odd, Odd([1.0, math.nan]), framing).values[0] == 1.0
