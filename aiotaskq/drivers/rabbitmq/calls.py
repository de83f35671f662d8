"""What the event loop of a worker asks of the thread of its consumer."""

from __future__ import annotations

from collections.abc import Sequence


class FetchCall:
    """A call of `fetch`.

    It is told to end rather than cancelled: RabbitMQ does not bear it well when consuming ends
    before its beginning was answered.
    """

    __slots__ = ("is_over", "limit", "order", "wait")

    def __init__(self, limit: int, wait: float, order: Sequence[str]) -> None:
        self.limit = limit
        self.wait = wait
        self.order = order
        self.is_over = False
