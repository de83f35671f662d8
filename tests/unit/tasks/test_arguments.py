"""Arguments: checked against the signature, converted to the annotations."""

from __future__ import annotations

import enum
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, NewType, NotRequired, TypedDict
from uuid import UUID

import msgspec
import pytest
from pydantic import BaseModel, ConfigDict, field_validator

from aiotaskq.contract.message import Message
from aiotaskq.encoding.codec import Codec, Serializer
from aiotaskq.errors import ConfigError, DecodeError
from aiotaskq.tasks.arguments import Arguments

FRAMINGS: tuple[Serializer, ...] = ("json", "msgpack")
framings = pytest.mark.parametrize("framing", FRAMINGS)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Cat:
    name: str
    photo: bytes = b""


@dataclass
class Dog:
    barks: int
    born: date | None = None


@dataclass
class Home:
    pet: Cat | Dog


class Struct(msgspec.Struct):
    id: UUID
    tags: set[str] = set()


class Row(TypedDict):
    a: int
    b: NotRequired[Decimal]


class Pair(NamedTuple):
    left: int
    right: str


class Model(BaseModel):
    id: UUID
    at: datetime | None = None


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, ser_json_bytes="base64", val_json_bytes="base64")
    id: UUID
    data: bytes


class Picky(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def check(cls, n: int) -> int:
        raise {0: KeyError, 1: ValueError, 2: RuntimeError}[n]("picky")


@dataclass
class Touchy:
    n: int

    def __post_init__(self) -> None:
        raise KeyError("touchy")


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@dataclass
class VeryTouchy:
    n: int

    def __post_init__(self) -> None:
        raise HostileError


class Opaque:
    """A type to which nothing can be converted."""


UserId = NewType("UserId", int)


def call(
    fn: Callable[..., Any], /, *args: Any, framing: Serializer = "json", **kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Send the call through the codec, and read it as a worker does."""
    codec = Codec(task_serializer=framing, accept=("json", "msgpack", "pickle"))
    arguments = Arguments(fn)
    arguments.check(args, kwargs)
    packed, named, pickled = codec.pack(args, kwargs)
    body = codec.encode_message(
        Message(id="1", task="t", args=packed, kwargs=named, pickled=pickled)
    )
    return arguments.load(codec.decode_message(body), body)


def load(fn: Callable[..., Any] | Arguments, body: bytes) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments = fn if isinstance(fn, Arguments) else Arguments(fn)
    return arguments.load(Codec().decode_message(body), body)


def taking(annotation: Any) -> Callable[[Any], Any]:
    """Return a function with one parameter of that annotation."""

    def fn(x: Any) -> Any:
        return x

    fn.__annotations__ = {"x": annotation, "return": annotation}
    return fn


VALUES: list[tuple[Any, Any]] = [
    (Any, {"a": [1, None]}),
    (object, [1]),
    (int, -(2**63)),
    (float, 1.5),
    (bool, True),
    (str, "ü\u2028\x00"),
    (bytes, b"\x00\xff"),
    (bytearray, bytearray(b"\x01")),
    (None, None),
    (UUID, UUID(int=7)),
    (datetime, datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)),
    (datetime, datetime(2026, 1, 2, 3, 4, 5)),
    (date, date(2026, 1, 2)),
    (time, time(1, 2, 3)),
    (timedelta, timedelta(days=-1, microseconds=5)),
    (Decimal, Decimal("1.10")),
    (Colour, Colour.BLUE),
    (Level, Level.LOW),
    (Literal["a", 1], "a"),
    (Cat, Cat("Tom", b"\xff")),
    (Struct, Struct(UUID(int=1), {"x"})),
    (Row, {"a": 1, "b": Decimal("0.1")}),
    (Pair, Pair(1, "b")),
    (UserId, 5),
    (Annotated[int, msgspec.Meta(ge=0)], 3),
    (UUID | None, None),
    (UUID | None, UUID(int=3)),
    (int | str | list[Decimal], [Decimal("1.5")]),
    (list[Cat], [Cat("Tom")]),
    (dict[str, Dog], {"a": Dog(1, date(2026, 1, 2))}),
    (dict[int, str], {1: "a"}),
    (dict[UUID, Colour], {UUID(int=1): Colour.RED}),
    (tuple[int, str], (1, "a")),
    (tuple[Colour, ...], (Colour.RED,)),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (Sequence[Pair], [Pair(1, "b")]),
    (Mapping[str, Level], {"x": Level.LOW}),
    (PurePosixPath, PurePosixPath("/a/b")),
    (Path | None, Path("/a")),
    (list[Path], [Path("a"), Path("b")]),
    (Model, Model(id=UUID(int=1), at=datetime(2026, 1, 2, tzinfo=UTC))),
    (Model | None, Model(id=UUID(int=1))),
    (list[Model], [Model(id=UUID(int=1))]),
    (dict[str, Model], {"a": Model(id=UUID(int=1))}),
    (StrictModel, StrictModel(id=UUID(int=1), data=b"\xff")),
    # Types that msgspec leaves to pydantic.
    (Cat | Dog, Cat("Tom", b"\xff\x00")),
    (Cat | Dog, Dog(3, date(2026, 1, 2))),
    (list[Cat | Dog], [Dog(1), Cat("Tom")]),
    (Home, Home(Cat("Tom", b"\xff"))),
    (Model | Cat, Model(id=UUID(int=1))),
    (Model | int, 5),
    (Path | int, Path("a")),
    (set[int] | list[str], ["a"]),
]


@framings
@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=repr)
def test_an_argument_arrives_as_its_annotation_says(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    fn = taking(annotation)
    for _ in range(3):  # the first call of a shape is read in another way than the next
        assert call(fn, value, framing=framing) == ((value,), {})
        assert call(fn, x=value, framing=framing) == ((), {"x": value})


@framings
@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=repr)
def test_a_result_arrives_as_its_annotation_says(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    codec = Codec(result_serializer=framing)
    read = Arguments(taking(annotation)).read_result
    got = codec.decode_result(codec.encode_result(value), read)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, b'"5"'),
        (int, b"1.5"),
        (int, b"null"),
        (str, b"5"),
        (bool, b"1"),
        (UUID, b'"x"'),
        (datetime, b'"yesterday"'),
        (Decimal, b'"x"'),
        (Colour, b'"green"'),
        (Cat, b'{"photo":""}'),
        (Cat, b"[]"),
        (Struct, b'{"id":1}'),
        (Row, b"{}"),
        (Pair, b"[1]"),
        (Literal["a"], b'"b"'),
        (Annotated[int, msgspec.Meta(ge=0)], b"-1"),
        (Model, b'{"id":"x"}'),
        (Model, b"5"),
        (Cat | Dog, b'{"barks":"x"}'),
        (Path, b"5"),
        (Opaque, b"{}"),
        (Touchy, b'{"n":1}'),
        (VeryTouchy, b'{"n":1}'),
        (Picky, b'{"n":0}'),
        (Picky, b'{"n":1}'),
        (Picky, b'{"n":2}'),
        (Picky | int, b'{"n":0}'),
        (list[Any], b"[" * 50_000 + b"]" * 50_000),
        (Any, b"nonsense"),
        (Any, b'"\\ud800"'),
    ],
    ids=repr,
)
def test_an_argument_that_does_not_fit_is_a_decode_error_with_its_name(
    annotation: Any, text: bytes
) -> None:
    def fn(fine: int, x: Any = 0) -> None: ...

    fn.__annotations__ = {"fine": int, "x": annotation}
    arguments = Arguments(fn)
    for _ in range(3):
        with pytest.raises(DecodeError) as refused:
            load(arguments, b'{"id":"1","task":"t","args":[1,' + text + b"]}")
        if not text.startswith(
            (b"nonsense", b"[[", b'"\\ud')
        ):  # noticed before the arguments are read
            assert "'x'" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_bytes_beside_pydantic_types_stay_bytes() -> None:
    def fn(pet: Cat | Dog, data: bytes, number: int) -> None: ...

    arguments = Arguments(fn)
    codec = Codec()
    args, _, _ = codec.pack((Cat("Tom"), b"aGk=", 5), {})
    body = codec.encode_message(Message(id="1", task="t", args=args))
    for _ in range(3):
        assert arguments.load(codec.decode_message(body), body)[0] == (Cat("Tom"), b"aGk=", 5)
    with pytest.raises(DecodeError, match="number"):
        load(arguments, b'{"id":"1","task":"t","args":[{"name":"Tom"},"","5"]}')


@pytest.mark.parametrize("args", [b"5", b"{}", b'"x"', b"[1", b"nul"])
def test_arguments_that_are_no_list_are_a_decode_error(args: bytes) -> None:
    with pytest.raises(DecodeError):
        load(taking(Any), b'{"id":"1","task":"t","args":' + args + b"}")


def test_keywords_that_are_no_map_are_a_decode_error() -> None:
    with pytest.raises(DecodeError, match="keyword arguments"):
        load(taking(Any), b'{"id":"1","task":"t","kwargs":[1]}')


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [(b"[]", b"{}"), (b"[1,2]", b"{}"), (b"[1]", b'{"x":1}'), (b"[1]", b'{"y":1}')],
)
def test_a_message_that_does_not_fit_the_signature_is_a_decode_error(
    args: bytes, kwargs: bytes
) -> None:
    with pytest.raises(DecodeError):
        load(taking(int), b'{"id":"1","task":"t","args":' + args + b',"kwargs":' + kwargs + b"}")


# --- signatures ---------------------------------------------------------------------------------


def everything(
    first: int, /, second: UUID, third: Colour = Colour.RED, *rest: Decimal, key: date, **more: Cat
) -> None: ...


@framings
def test_every_kind_of_parameter_is_converted(framing: Serializer) -> None:
    args = (1, UUID(int=2), Colour.BLUE, Decimal("3.1"), Decimal("4.2"))
    kwargs = {"key": date(2026, 1, 2), "first": Cat("a"), "rest": Cat("b"), "more": Cat("c")}
    assert call(everything, *args, framing=framing, **kwargs) == (args, kwargs)


@framings
def test_parameters_may_be_named_like_options(framing: Serializer) -> None:
    def fn(self: int, args: UUID, kwargs: int, timeout: UUID, queue: str, fn: int) -> None: ...

    kwargs = {"timeout": UUID(int=1), "queue": "q", "fn": 3, "kwargs": 4}
    assert call(fn, 1, UUID(int=2), framing=framing, **kwargs) == ((1, UUID(int=2)), kwargs)
    arguments = Arguments(fn)
    arguments.check((), {"self": 1, "args": UUID(int=2), **kwargs})


def test_variadic_functions_are_read_at_any_length() -> None:
    def fn(*numbers: Decimal) -> None: ...

    arguments = Arguments(fn)
    codec = Codec()
    for count in [*range(150), 3, 2]:
        args, _, _ = codec.pack((Decimal(1),) * count, {})
        body = codec.encode_message(Message(id="1", task="t", args=args))
        assert arguments.load(codec.decode_message(body), body)[0] == (Decimal(1),) * count


def test_defaults_are_left_to_the_function() -> None:
    assert call(everything, 1, UUID(int=1), key=date(2026, 1, 1))[0] == (1, UUID(int=1))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1,), {}),
        ((1, 2), {}),
        ((1,), {"second": 2, "key": 3, "third": 4}),
        ((1, 2, 3), {"third": 3, "key": 1}),
    ],
)
def test_check_raises_exactly_where_calling_would(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    fits = True
    try:
        everything(*args, **kwargs)
    except TypeError:
        fits = False
    if fits:
        Arguments(everything).check(args, kwargs)
    else:
        with pytest.raises(TypeError, match="everything"):
            Arguments(everything).check(args, kwargs)


# --- annotations --------------------------------------------------------------------------------


def test_annotations_as_text_are_resolved() -> None:
    fn = taking("Cat | None")
    assert call(fn, Cat("Tom")) == ((Cat("Tom"),), {})


def test_an_annotation_that_cannot_be_resolved_shows_when_prepared() -> None:
    with pytest.raises(ConfigError, match=r"fn.*Missing"):
        Arguments(taking("Missing")).prepare()


def test_an_annotation_inside_a_class_that_cannot_be_resolved_shows_when_prepared() -> None:
    @dataclass
    class Broken:
        x: "Missing"  # type: ignore[name-defined]  # noqa: F821, UP037 - that is the point

    with pytest.raises(ConfigError, match="Missing"):
        Arguments(taking(Broken)).prepare()


def test_a_type_that_nothing_can_convert_to_shows_when_prepared() -> None:
    with pytest.raises(ConfigError, match="annotate"):
        Arguments(taking(Struct | Opaque)).prepare()


def test_without_pydantic_the_error_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ConfigError, match=r"aiotaskq\[pydantic\]"):
        Arguments(taking(Cat | Dog)).prepare()


def test_valid_annotations_are_prepared_without_a_warning() -> None:
    Arguments(everything).prepare()


def test_a_function_without_annotations_takes_any_arguments() -> None:
    assert call(lambda x, *y: None, [1], {"a": 2}) == (([1], {"a": 2}), {})


def test_a_builtin_function_has_arguments_too() -> None:
    assert call(divmod, 7, 2) == ((7, 2), {})


# --- values that are hard to write --------------------------------------------------------------


def test_pickled_arguments_arrive_as_they_were() -> None:
    value = {1j: Opaque}
    assert call(taking(int), value, framing="pickle") == ((value,), {})


def test_pickled_arguments_are_checked_against_the_signature() -> None:
    body = Codec(task_serializer="pickle").encode_message(
        Message(id="1", task="t", pickled=pickle.dumps(((1, 2, 3), {})))
    )
    message = Codec(accept=["pickle"]).decode_message(body)
    with pytest.raises(DecodeError, match="too many"):
        Arguments(taking(int)).load(message, body)


def test_a_large_integer_arrives_exactly() -> None:
    assert call(taking(int), 2**200) == ((2**200,), {})
    assert call(taking(Any), -(2**200)) == ((-(2**200),), {})


# --- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "value"),
    [(int, "text"), (Opaque, {"a": 1}), (Touchy, {"n": 1}), ("Missing", [1]), (Struct | Opaque, 5)],
    ids=repr,
)
@framings
def test_a_result_that_does_not_fit_its_annotation_arrives_as_it_is(
    annotation: Any, value: Any, framing: Serializer
) -> None:
    codec = Codec(result_serializer=framing)
    read = Arguments(taking(annotation)).read_result
    for _ in range(2):
        assert codec.decode_result(codec.encode_result(value), read) == value


def test_a_pickled_result_is_not_converted() -> None:
    codec = Codec(result_serializer="pickle", accept=["pickle"])
    read = Arguments(taking(set[str])).read_result
    assert codec.decode_result(codec.encode_result(["a"]), read) == ["a"]
