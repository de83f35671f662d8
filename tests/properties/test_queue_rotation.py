"""Properties of the order of queues, for any weights."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from aiotaskq.worker.queue_rotation import QueueRotation

WEIGHTS = st.dictionaries(st.text(max_size=3), st.integers(1, 12), min_size=1, max_size=6)


@given(weights=WEIGHTS, start=st.integers(0, 100))
def test_in_any_round_each_queue_comes_first_as_often_as_its_weight_says(
    weights: dict[str, int], start: int
) -> None:
    rotation = QueueRotation(weights)
    firsts = [rotation.next()[0] for _ in range(start + sum(weights.values()))]
    assert Counter(firsts[start:]) == weights


@given(weights=WEIGHTS)
def test_each_order_names_every_queue_once_and_the_heavier_of_the_others_first(
    weights: dict[str, int],
) -> None:
    rotation = QueueRotation(weights)
    for _ in range(sum(weights.values())):
        order = rotation.next()
        assert sorted(order) == sorted(weights)
        others = [weights[queue] for queue in order[1:]]
        assert others == sorted(others, reverse=True)


@given(weights=WEIGHTS, count=st.integers(1, 60))
def test_no_queue_is_ever_a_whole_turn_ahead_of_its_share(
    weights: dict[str, int], count: int
) -> None:
    rotation = QueueRotation(weights)
    firsts = Counter(rotation.next()[0] for _ in range(count))
    total = sum(weights.values())
    for queue, weight in weights.items():
        assert firsts[queue] - count * weight / total < 1


def test_the_turns_of_a_queue_are_spread() -> None:
    rotation = QueueRotation({"a": 6, "b": 3, "c": 1})
    assert "".join(rotation.next()[0] for _ in range(20)) == "abaabacaba" * 2
