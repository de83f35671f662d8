"""Delays at RabbitMQ: the queues that a delayed message passes before it reaches its own.

A message can leave a queue only at its head, so all messages of a queue must wait for the same
time, or one would wait behind another that is due later. So a delay is written as a hexadecimal
number of milliseconds, and each digit that is not zero is a wait in the queue for this digit at
this position.

A message with a longer delay goes this way as often as it takes. It arrives early in its own queue,
and the consumer that gets it delays it for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from aiotaskq.contract.message import Envelope

DIGIT_HEADER = "aq-digit-"
"""The header with the digit at a position, by which the exchange of that position routes."""

_DIGITS = 8  # hexadecimal ones: the server holds a message back for 2 ** 32 milliseconds at most
_STEP = 16**_DIGITS - 1  # milliseconds; longer delays have several steps of this length before
_MOST_STEPS = 8

POSITIONS = _DIGITS + _MOST_STEPS
"""The number of queues that a message may have to pass at most."""

LONGEST_DELAY = _MOST_STEPS * _STEP / 1000
"""Seconds that one way through the queues may take: 397 days."""


class Hop(NamedTuple):
    """A queue in which a delayed message waits."""

    position: int
    digit: int
    milliseconds: int


def delay_of(envelope: Envelope, now: float) -> float:
    """Return the seconds from now on until an envelope is due; 0 if it is due."""
    if envelope.delay is not None:
        return max(envelope.delay, 0.0)
    return 0.0 if envelope.not_before is None else max(envelope.not_before - now, 0.0)


def hops(seconds: float) -> list[Hop]:
    """Return the queues in which a message waits, in this order; none if there is no delay.

    A delay beyond `LONGEST_DELAY` is begun: the message has to be delayed once more after these.
    """
    if seconds <= 0.0:
        return []
    # The server ignores fractions of a millisecond, so a message may leave each queue up to one
    # millisecond early: that is added for each hop.
    wanted = math.ceil(min(seconds, LONGEST_DELAY) * 1000)
    wanted += sum(1 for _ in _split(wanted))
    # The last digit leads to the message's own queue, so it is never 0.
    return list(_split(wanted if wanted & 15 else wanted + 1))


def _split(milliseconds: int) -> Iterator[Hop]:
    steps, rest = divmod(milliseconds, _STEP)
    for step in reversed(range(min(steps, _MOST_STEPS))):
        yield Hop(_DIGITS + step, 1, _STEP)
    rest += max(0, steps - _MOST_STEPS) * _STEP
    for position in reversed(range(_DIGITS)):
        digit = rest >> 4 * position & 15
        if digit:
            yield Hop(position, digit, digit << 4 * position)
