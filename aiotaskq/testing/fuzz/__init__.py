"""A fuzzer for drivers: hostile entries in a store, with good tasks beside them.

Whoever can write to a store may write anything: a message that is none, a number that is text, a
key of another type. A driver gives its *attacks*, each of which writes one such thing; the fuzzer
makes them in a random order. After each attack good tasks have to end well, and the runs of a
schedule go on; at the end the commands about dead letters have to work::

    async def test_hostile_entries_harm_nobody(tmp_path):
        attacks = [*body_attacks(broker.publish, SEED), *my_attacks(URL)]
        await fuzz(URL, attacks, seconds=5.0, seed=SEED)
        check_dead_commands(URL, tmp_path)

=======  ==============================================================
`seeds`  values that break their readers: bodies, heads, texts, notices
`run`    the fuzzer
=======  ==============================================================
"""

from __future__ import annotations

from aiotaskq.testing.fuzz.run import Attack, body_attacks, check_dead_commands, fuzz
from aiotaskq.testing.fuzz.seeds import NOTICES, bodies, heads, texts

__all__ = [
    "NOTICES",
    "Attack",
    "bodies",
    "body_attacks",
    "check_dead_commands",
    "fuzz",
    "heads",
    "texts",
]
