"""Settlements: what a worker decided about a delivery."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from aiotaskq.contract.message import Delivery, Envelope


class Done(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Finished: forget the envelope."""

    delivery: Delivery


class Again(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Store `envelope` in place of the delivered one, in one step."""

    delivery: Delivery
    envelope: Envelope


class Dead(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Keep it among the dead letters, payload untouched, with the reason."""

    delivery: Delivery
    reason: str
    details: bytes = b""  # whatever else is known of it; no driver reads it


class Release(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Hand it back unrun: to the head of its queue, nothing counted."""

    delivery: Delivery


Settlement: TypeAlias = Done | Again | Dead | Release
