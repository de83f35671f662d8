"""The error for a value that a store can never keep."""

from __future__ import annotations

from aiotaskq.errors import EncodeError


class UnstorableValue(EncodeError):
    """A value that the store cannot keep; the message is the reason."""
