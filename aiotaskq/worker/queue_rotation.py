"""The order in which a fetch drains queues that have weights. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class QueueRotation:
    """Smooth weighted round robin over the queues of a worker, as nginx has it.

    In S calls of `next`, where S is the sum of the weights, each queue comes first as often as its
    weight says, spread evenly. The other queues follow by weight, so that a fetch returns something
    whenever any queue has something.

    Args:
        weights: Of each queue, 1 or more.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = dict(weights)
        self._sum = sum(weights.values())
        # The credit of each queue: it grows by the weight, and coming first costs the sum.
        self._owed = dict.fromkeys(weights, 0)
        heaviest = sorted(weights, key=lambda queue: -weights[queue])
        self._orders: dict[str, Sequence[str]] = {
            first: (first, *(queue for queue in heaviest if queue != first)) for first in weights
        }

    def next(self) -> Sequence[str]:
        """Return the order in which the next fetch drains the queues."""
        for queue, weight in self._weights.items():
            self._owed[queue] += weight
        first = max(self._owed, key=self._owed.__getitem__)
        self._owed[first] -= self._sum
        return self._orders[first]
