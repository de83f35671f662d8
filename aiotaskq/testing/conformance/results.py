"""The conformance suite of a result backend: all its parts in one class."""

from __future__ import annotations

from aiotaskq.testing.conformance.result_outages import ResultOutageTests
from aiotaskq.testing.conformance.result_store import StoreTests
from aiotaskq.testing.conformance.subscribe import SubscribeTests


class ResultConformance(StoreTests, SubscribeTests, ResultOutageTests):
    """Everything that a result backend must do. Derive from it and give the fixture `harness`.

    The class attribute `ttl` is in seconds; lower it where the harness's `pass_time` really
    sleeps.
    """
