"""A process that publishes, fetches and settles until somebody kills it.

``python busy.py URL LOG`` appends a line to the log for each id whose `publish` has returned
(``+ id``) and for each that it is about to settle with `Done` (``- id``).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import sys
from pathlib import Path

from aiotaskq_folder import FolderBroker
from aiotaskq_folder.consumer import FolderConsumer

from aiotaskq.contract.message import Delivery, Envelope
from aiotaskq.contract.settlement import Again, Done, Release, Settlement
from aiotaskq.errors import LeaseLost

LEASE = 1.0


async def main(url: str, log: Path) -> None:
    broker = FolderBroker(url)
    await broker.open()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(publish(broker, log))
        tasks.create_task(maintain(broker))
        while True:
            await work(broker, log)


async def publish(broker: FolderBroker, log: Path) -> None:
    while True:
        ids = [secrets.token_hex(4) for _ in range(random.randint(1, 5))]
        await broker.publish([Envelope(id=one, queue="q", body=b"") for one in ids], call_id=ids[0])
        write(log, "+", ids)
        await asyncio.sleep(0.02)


async def maintain(broker: FolderBroker) -> None:
    while True:
        await broker.maintain()
        await asyncio.sleep(0.2)


async def work(broker: FolderBroker, log: Path) -> None:
    """Be one incarnation of a worker, as long as its lease lasts."""
    consumer = broker.consumer(["q"], name="busy", lease=LEASE)
    await consumer.open()
    beating = asyncio.create_task(beat(broker, consumer))
    try:
        while True:
            got = await consumer.fetch(10, 1.0)
            batch = [settlement(one) for one in got]
            write(log, "-", [one.delivery.id for one in batch if isinstance(one, Done)])
            await consumer.settle(batch)
    except LeaseLost:
        await consumer.close()
    finally:
        beating.cancel()


async def beat(broker: FolderBroker, consumer: FolderConsumer) -> None:
    lease = broker.lease(consumer.grant)
    while await lease.renew():
        await asyncio.sleep(LEASE / 5)


def settlement(one: Delivery) -> Settlement:
    again = Envelope(id=one.id, queue="q", body=b"", delay=random.choice([None, 0.1]))
    choices: list[Settlement] = [Done(one), Done(one), Again(one, again), Release(one)]
    return random.choice(choices)


def write(log: Path, sign: str, ids: list[str]) -> None:
    with log.open("a") as file:
        file.write("".join(f"{sign} {one}\n" for one in ids))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
