"""The conformance suite of a broker: all its parts in one class."""

from __future__ import annotations

from aiotaskq.testing.conformance.cancel import CancelTests
from aiotaskq.testing.conformance.clock import ClockTests
from aiotaskq.testing.conformance.dead_letters import DeadLetterTests
from aiotaskq.testing.conformance.death import ConsumerListTests, LeaseEndTests
from aiotaskq.testing.conformance.fetch import FetchTests
from aiotaskq.testing.conformance.leases import LeaseTests
from aiotaskq.testing.conformance.lifecycle import LifecycleTests
from aiotaskq.testing.conformance.outages import OutageTests
from aiotaskq.testing.conformance.publish import PublishTests, UniqueTests
from aiotaskq.testing.conformance.queues import QueueTests
from aiotaskq.testing.conformance.refusals import RefusalTests
from aiotaskq.testing.conformance.schedules import ScheduleTests
from aiotaskq.testing.conformance.settle import SettlementTests
from aiotaskq.testing.conformance.suspects import SuspectTests


class BrokerConformance(
    LifecycleTests,
    PublishTests,
    UniqueTests,
    RefusalTests,
    ClockTests,
    FetchTests,
    SuspectTests,
    SettlementTests,
    CancelTests,
    DeadLetterTests,
    QueueTests,
    LeaseTests,
    LeaseEndTests,
    ConsumerListTests,
    ScheduleTests,
    OutageTests,
):
    """Everything that a broker must do. Derive from it and give the fixture `harness`.

    The class attributes `lease` and `delay` are seconds; lower them where the harness's
    `pass_time` really sleeps. Set `impossible` if the broker cannot store all that the core sends.
    """
