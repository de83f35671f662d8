"""Settlements: the decision of a worker about a delivery.

Each one takes effect once, or not at all if the receipt of its delivery is void.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from aiotaskq.contract.message import Delivery, Envelope


class Done(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The task has ended: delete the message."""

    delivery: Delivery


class Again(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The task runs again: replace the message with `envelope`, in one step.

    The envelope may have a delay, another queue or another id. It is not stored if the message was
    cancelled and the id is the same.
    """

    delivery: Delivery
    envelope: Envelope


class Dead(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The task cannot end well: move the message, unchanged, to the dead letters."""

    delivery: Delivery
    reason: str
    details: bytes = b""  # `DeathDetails` as JSON; no driver reads it


class Release(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The task was not run to its end: give it back to the head of its queue, without a crash."""

    delivery: Delivery


Settlement: TypeAlias = Done | Again | Dead | Release
