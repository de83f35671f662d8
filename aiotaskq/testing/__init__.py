"""What proves a driver: conformance suites and a model, for pytest.

A driver's test file gives a harness and nothing else::

    class TestMyBroker(BrokerConformance):
        @pytest.fixture
        async def harness(self):
            harness = MyHarness()
            yield harness
            await harness.close()

======================  =========================================================
`testing.brokers`       `BrokerHarness`, `BrokerConformance`
`testing.results`       `ResultHarness`, `ResultConformance`
`testing.model`         `broker_machine`, random histories against a model (Hypothesis)
======================  =========================================================

The suites need pytest and pytest-asyncio in its auto mode.
"""

from __future__ import annotations

import pytest

# Before the suites are imported: their plain asserts are to explain themselves as a test's do.
pytest.register_assert_rewrite(
    "aiotaskq.testing.brokers",
    "aiotaskq.testing.ear",
    "aiotaskq.testing.leases",
    "aiotaskq.testing.model",
    "aiotaskq.testing.outages",
    "aiotaskq.testing.publishing",
    "aiotaskq.testing.results",
    "aiotaskq.testing.rig",
)
