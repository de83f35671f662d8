"""Tagged forms that anybody may have written: they are read, or refused by a ValueError."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiotaskq.encoding import tags
from aiotaskq.encoding.codec import Codec, decode_plain
from aiotaskq.encoding.tags import resolve
from aiotaskq.errors import DecodeError
from aiotaskq.tasks.arguments import Arguments

NAMES = ["enum", *tags._READERS]


def deep(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


ODD: list[Any] = [
    *(None, True, 0, -1, 2**64 - 1, 1.5, 1e300, float("nan"), float("inf")),
    *(
        "",
        "\0",
        "x",
        "é",
        "\ud800",
        "x" * 100_000,
        "9" * 10_000,
        "0x" + "f" * 10_000,
        "1e999999999",
    ),
    *("Europe", "Europe/", "..", "/", "../../etc/passwd", "a/" * 1000, "x" * 300, "__init__.py"),
    *("tzdata.zi", "zone.tab", "Europe/\0", "Europe/__init__.py", "1/0", "/1", "2026-13-01"),
    *([], [[]], [{}], [None], [1, 2], ["a", 1], [1e300] * 3, [2**60] * 3, ["Europe", 1], [[1, 2]]),
    *({}, {"hex": 1}, {"hex": "x"}, {"__type__": "set", "__value__": [1]}),
    *([b"x"], b"x", deep(50), [["2026-01-01T00:00:00", 5]], ["2026-01-01T00:00:00", 5]),
]


class Picky(enum.Enum):
    RED = 1

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise OSError("a class of the user")


@pytest.mark.parametrize("name", NAMES)
def test_a_tag_with_an_odd_value_is_read_or_a_value_error(name: str) -> None:
    for odd in ODD:
        for value in (odd, [odd], [odd, odd], ["Picky", odd]):
            with suppress(ValueError):
                resolve({"__type__": name, "__value__": value}, {"Picky": Picky})


@pytest.fixture
def tzdata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a package of time zones beside those of the system, with one folder in it."""
    (tmp_path / "tzdata" / "zoneinfo" / "Europe").mkdir(parents=True)
    for folder in ("tzdata", "tzdata/zoneinfo"):
        (tmp_path / folder / "__init__.py").touch()
    names = ("tzdata", "tzdata.zoneinfo")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.usefixtures("tzdata")
@pytest.mark.parametrize("key", ["Europe", "x" * 300], ids=len)
def test_a_time_zone_that_is_no_file_is_a_decode_error(key: str) -> None:
    form = {"__type__": "zoneinfo", "__value__": key}
    with pytest.raises(ValueError, match="tagged value"):
        decode_plain(msgspec.json.encode(form), True)

    def fn(x: Any) -> None: ...

    body = b'{"id":"1","task":"t","args":[%s]}' % msgspec.json.encode(form)
    with pytest.raises(DecodeError, match="'x'"):
        Arguments(fn).load(Codec().decode_message(body), body)
    with pytest.raises(DecodeError, match="not a result"):
        Codec().decode_result(msgspec.Raw(msgspec.json.encode(form)))


def test_tags_in_one_another_without_end_are_a_value_error() -> None:
    form: Any = []
    for _ in range(100_000):
        form = {"__type__": "tuple", "__value__": [form]}
    with pytest.raises(ValueError, match="cannot be read"):
        resolve(form)
    while form:  # taken apart here: Python would do it in one go
        form = form["__value__"][0] if isinstance(form, dict) else None
