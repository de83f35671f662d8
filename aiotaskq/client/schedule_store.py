"""The store of schedules for a broker that has none, such as RabbitMQ.

The schedules rest in another store, which moves a schedule on and keeps the messages of its runs in
one step, as always. The messages wait there in an outbox, from which the relay of any scheduler
passes them on to the broker. So a scheduler that dies between the two loses no run. A run may be
sent twice if the relay dies between the two; its id is the same, and its first outcome stays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from aiotaskq.client.outbox import enclose
from aiotaskq.config import Config
from aiotaskq.contract.broker import Broker
from aiotaskq.contract.message import Envelope
from aiotaskq.contract.records import DueSchedules, StoredSchedule
from aiotaskq.contract.schedules import ScheduleStore
from aiotaskq.drivers import EMBEDDED, create_broker
from aiotaskq.errors import ConfigError

_PART = "schedules"
_RESULTS_ONLY = ("disabled", "rpc:", "amqp:", "amqps:", "memory:")


class RelayedSchedules:
    """Schedules whose runs wait in the outbox of their store until a relay passes them on."""

    def __init__(self, inner: ScheduleStore) -> None:
        self._inner = inner

    async def load(self, ids: Collection[str] | None = None) -> Sequence[StoredSchedule]:
        return await self._inner.load(ids)

    async def due(self, limit: int) -> DueSchedules:
        return await self._inner.due(limit)

    async def compare_and_swap(
        self,
        schedule_id: str,
        seen: str | None,
        new: StoredSchedule | None,
        batch: Sequence[Envelope] = (),
    ) -> bool:
        return await self._inner.compare_and_swap(
            schedule_id, seen, new, [enclose(one) for one in batch]
        )


def create_schedule_broker(conf: Config, broker: Broker, results: object) -> Broker | None:
    """Return the closed broker that stores the schedules of another one; None: it does so itself.

    That is the store of the setting `schedule_store`, else the broker, else the store of the
    results, else the embedded default, an SQLite file.

    Args:
        conf: The settings.
        broker: The broker of the application.
        results: The result backend: a URL, a driver, or None.

    Raises:
        ConfigError: No driver serves the URL of `schedule_store`, or its broker has no schedules.
    """
    prefix = f"{conf.prefix}_{_PART}"
    if conf.schedule_store is not None:
        chosen = create_broker(conf.schedule_store, prefix=prefix)
        if not chosen.traits.schedules:
            raise ConfigError(
                f"schedule_store is {chosen.url}, which stores no schedules: give redis://,"
                " postgresql:// or sqlite:///"
            )
        return chosen
    if broker.traits.schedules:
        return None
    if isinstance(results, str) and not results.startswith(_RESULTS_ONLY):
        scheme, colon, rest = results.partition(":")
        # Celery's name of a store of results; as a broker it has the name of its protocol.
        scheme = "postgresql" if scheme.startswith("db+postgresql") else scheme
        try:
            found = create_broker(f"{scheme}{colon}{rest}", prefix=prefix)
        except ConfigError:  # it stores results alone, and the embedded default does as well
            pass
        else:
            if found.traits.schedules and found.traits.shared:
                return found
    return create_broker(EMBEDDED, prefix=prefix)
