"""Random histories of a broker, checked step by step against a model (needs Hypothesis).

`check_broker` plays them: consumers that live, die, stand still or are seen to die, messages of
every kind, and calls that are repeated or given up midway. What must hold, and where it is seen:

==============  ================================================================================
placement       a copy is ready, delayed, held, dead or gone, and in one of these at a time: what
                is handed out was ready (`Shadow.handed`), and the counts agree after each step
terminal once   what is done or dead is never handed out, and settling it again changes nothing
fresh receipts  each hand-out has a receipt of its own; those of earlier ones are void (`settle`)
fence           void receipts and consumers that were given up change nothing (`settle`, `fetch`)
conservation    what came in is ready, delayed, held, dead or gone (`depth_tells_the_truth`)
no return       a unique id is refused, a cancelled one is not handed out (`publish`, `cancel`)
liveness        in the end one worker alone that tends and fetches gets all there is (`_work_off`)
crashes         counted at each death and nowhere else, with a note (`Shadow.handed`)
lease           only who was not given up fetches and renews, and nobody comes back (`renew`)
bounded work    one round of `maintain` moves a bounded number (`rig.maintain`)
no leak         when all is done nothing stays in the store for ever (`teardown`)
stall           when the server stood still, nobody is given up who lives (`stall`)
order           queues as asked for, else in the consumer's order, then priority, then age; heads
                before tails, and suspects alone and before all others (`Shadow.handed`)
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
    `pass_time` must not sleep; hours pass here, unless the broker lacks the traits `clock` and
    `leases`: then nothing is delayed or expires, and consumers die by `LethalHarness.kill`. Without
    the trait `order`, what is asked of order, of the size of a batch and of when suspects are known
    of is left out, and counts have to be right soon instead of at once.

    Args:
        make_harness: Returns a harness on an empty store, as it is or to be awaited.
        examples: How many histories.
        steps: The length of the longest.
        shrink: Whether to look for a shorter one when one fails, which plays hundreds more.
    """

    class Machine(BrokerRules):
        async def harness_of(self) -> BrokerHarness:
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
