"""What the event loop of a worker asks of the thread of its consumer."""

from __future__ import annotations

from collections.abc import Sequence

from aiotaskq.contract.message import Delivery


class FetchCall:
    """A call of `fetch`.

    It is told to end rather than cancelled: RabbitMQ does not bear it well when consuming ends
    before its beginning was answered.

    Attributes:
        taken: What it returns. Should nobody be there any more to get it, it goes back.
    """

    __slots__ = ("is_over", "limit", "order", "taken", "wait")

    def __init__(self, limit: int, wait: float, order: Sequence[str]) -> None:
        self.limit = limit
        self.wait = wait
        self.order = order
        self.is_over = False
        self.taken: Sequence[Delivery] = ()
