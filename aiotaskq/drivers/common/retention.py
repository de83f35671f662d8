"""Times for which a store remembers ids and calls: promises of the contract for all drivers."""

from __future__ import annotations

UNIQUE_IDS_FOR = 86_400.0
"""Seconds for which a unique id is refused after it was stored; see `Envelope.unique`."""

CANCELLED_IDS_FOR = 7 * 86_400.0
"""Seconds for which a cancelled id stays cancelled; see `Broker.cancel`."""

CALLS_FOR = 120.0
"""Seconds for which a call of `Broker.publish` is remembered by its id.

The contract promises a minute from the error that the caller sees, and the error may come late.
"""
