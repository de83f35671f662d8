"""Random histories of a broker, checked step by step against a model (needs Hypothesis).

`check_broker` plays them: consumers that live, die or stand still, messages of every kind, and
calls that are repeated or cancelled midway. The properties that must hold, and the place of each
check:

==============  ================================================================================
placement       a copy is in exactly one state: ready, delayed, held, dead or gone. Only ready
                copies are delivered (`check_deliveries`), and counts agree (`depth_agrees`)
terminal once   a copy that is done or dead is never delivered, and settling it again changes
                nothing (`check_deliveries`, `settle`)
fresh receipts  each delivery has a receipt of its own; earlier receipts are void (`settle`)
fence           void receipts and consumers that were given up change nothing (`settle`, `fetch`)
conservation    each copy that was stored is counted in a state or gone (`depth_agrees`)
no return       a unique id is refused, a cancelled one is not delivered (`publish`, `cancel`)
liveness        in the end one consumer that fetches and maintains gets all copies (`_drain`)
crashes         counted at each death and nowhere else, with a note (`check_deliveries`)
lease           only consumers that were not given up fetch and renew (`fetch`, `renew`)
bounded work    one round of `maintain` moves a bounded number of messages (`rig.maintain`)
no leak         when all is done nothing stays in the store for ever (`teardown`)
stall           no living consumer is given up because the server stood still (`stall`)
order           queues as asked for, else in the consumer's order, then priority, then age; heads
                before tails, and suspects alone and before all others (`check_deliveries`)
==============  ================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from aiotaskq.testing.conformance.harness import BrokerHarness
from aiotaskq.testing.model.rules import BrokerRules


def check_broker(
    make_harness: Callable[[], BrokerHarness | Awaitable[BrokerHarness]],
    *,
    examples: int = 30,
    steps: int = 30,
    shrink: bool = True,
) -> None:
    """Play random histories on a broker, a fresh harness each, and compare with the model.

    Call it in a plain test: each history runs on an event loop of its own. The harness's
    `pass_time` must not sleep, since hours pass here. Brokers without the traits `clock` and
    `leases` are an exception: nothing is delayed or expires, and consumers die by
    `LethalHarness.kill`. Without the trait `order`, neither order nor the size of a batch is
    checked, nor when suspects are noticed; and counts may become right after a moment.

    Args:
        make_harness: Returns a harness on an empty store, or an awaitable of one.
        examples: The number of histories.
        steps: The length of the longest history.
        shrink: Whether to look for a shorter history when one fails, which plays hundreds more.
    """

    class Machine(BrokerRules):
        async def open_harness(self) -> BrokerHarness:
            made = make_harness()
            return await made if inspect.isawaitable(made) else made

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=[phase for phase in Phase if shrink or phase is not Phase.shrink],
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.filter_too_much,
                HealthCheck.data_too_large,
                HealthCheck.large_base_example,
            ],
        ),
    )
