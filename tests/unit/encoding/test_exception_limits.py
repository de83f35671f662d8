"""The limits of the data of an exception: of their size, and of the work for them."""

from __future__ import annotations

from typing import Any

import pytest

from aiotaskq.encoding.exceptions import describe, rebuild
from aiotaskq.errors import TaskFailed

MOST = 101_000  # bytes


def travel(error: BaseException) -> TaskFailed:
    raw, text = describe(error)
    assert len(bytes(raw)) < MOST
    assert len(text) < MOST
    return rebuild(raw, "1", text)


def with_attributes(**attributes: Any) -> Exception:
    error = ValueError("x")
    vars(error).update(attributes)
    return error


def members(failure: Any) -> list[Any]:
    return list(failure.exceptions) if isinstance(failure, ExceptionGroup) else []


def test_lists_that_share_their_parts_are_looked_at_for_a_bounded_time() -> None:
    shared: Any = [1]
    for _ in range(9):
        shared = [shared] * 30
    pairs: Any = {"a": 1}
    for _ in range(9):
        pairs = {str(n): pairs for n in range(30)}
    failure = travel(with_attributes(first=shared, second=pairs, code=5))
    assert isinstance(failure, ValueError)
    assert vars(failure)["code"] == 5
    assert not {"first", "second"} & vars(failure).keys()


def test_a_list_that_contains_itself_does_not_travel() -> None:
    ring: Any = [1]
    ring.extend([ring] * 30)
    loop: Any = {"a": 1}
    loop["loop"] = loop
    twice = [1]
    failure = travel(with_attributes(ring=ring, loop=loop, twice=[twice, twice]))
    assert not {"ring", "loop"} & vars(failure).keys()
    assert vars(failure)["twice"] == [[1], [1]]


@pytest.mark.parametrize("text", ["x", "é", "\0", "😀"])
def test_a_large_group_has_a_bounded_size_and_says_what_is_left_out(text: str) -> None:
    groups = [
        ExceptionGroup("inner", [ValueError(text * 10_000) for _ in range(100)]) for _ in range(20)
    ]
    failure = travel(ExceptionGroup("outer", groups))
    assert isinstance(failure, ExceptionGroup)
    assert failure.message == "outer"
    inside = members(failure)
    assert len(inside) == 20  # none displaces those beside it
    assert members(inside[0])
    left = sum(100 - len(members(group)) for group in inside)
    assert left > 0
    assert any("left out]" in str(group) for group in inside)


def test_a_small_group_says_nothing_of_what_is_left_out() -> None:
    failure = travel(ExceptionGroup("few", [ValueError("x" * 5000), KeyError("y" * 5000)]))
    assert "left out" not in str(failure)
    assert [one.args for one in members(failure)] == [("x" * 5000,), ("y" * 5000,)]


def test_the_attributes_of_all_members_have_one_limit() -> None:
    errors = [with_attributes(body="é" * 4000, other=["x" * 900] * 9) for _ in range(100)]
    failure = travel(ExceptionGroup("several", errors))
    assert len(members(failure)) == 100
    assert vars(members(failure)[0])["body"] == "é" * 4000


def test_more_members_than_travel_are_told() -> None:
    failure = travel(ExceptionGroup("wide", [ValueError(n) for n in range(1000)]))
    assert len(members(failure)) == 100
    assert str(failure) == "wide (1000 sub-exceptions) [900 left out]"


def test_groups_that_share_their_members_are_described_within_limits() -> None:
    error: Any = ValueError(1)
    for _ in range(9):
        error = ExceptionGroup("shared", [error] * 30)
    error.__cause__ = ExceptionGroup("cause", [KeyError("x")])
    failure = travel(error)
    assert isinstance(failure, ExceptionGroup)
    assert "too many to be shown" in str(failure.remote_traceback)


def test_names_of_any_length_are_cut() -> None:
    odd = type("N" * 1_000_000, (Exception,), {"__module__": "m" * 1_000_000})
    failure = travel(odd("x"))
    assert failure.exc_type.startswith("NNN")


def test_an_error_of_the_largest_parts_has_a_bounded_size() -> None:
    error = ValueError("\0" * 1000, ["x" * 9000])
    vars(error).update({f"name{n}": "\0" * 1000 for n in range(100)})
    raw, _ = describe(error)
    assert len(bytes(raw)) < MOST
