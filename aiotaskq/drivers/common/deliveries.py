"""Deliveries that a consumer has received and not yet returned; a suspect is returned alone."""

from __future__ import annotations

from collections import deque

from aiotaskq.contract.message import SUSPECT, Delivery


def next_is_suspect(received: deque[Delivery]) -> bool:
    """Return whether there are deliveries, and the first of them is a suspect."""
    return bool(received) and received[0].crashes >= SUSPECT


def hand_out(received: deque[Delivery], limit: int) -> list[Delivery]:
    """Remove the first deliveries and return them, up to `limit`, or one suspect alone."""
    if next_is_suspect(received):
        return [received.popleft()]
    return [received.popleft() for _ in range(min(limit, len(received)))]
