"""Tasks with delays, expiry and priorities, and queues with weights."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta

from aiotaskq import TaskQueue, TaskRevoked

app = TaskQueue("delays", broker="memory://", timezone="Europe/Paris")
ran: list[str] = []


@app.task
async def note(what: str) -> None:
    ran.append(what)


async def later() -> None:
    moment = datetime.now(UTC) + timedelta(seconds=0.6)
    handles = [
        await note.with_options(eta=moment).kiq("at a moment"),
        await note.with_options(countdown=0.3).kiq("after 0.3 s"),
        await note.kiq("at once"),
    ]
    async with app.worker():
        await asyncio.gather(*handles)
    print(ran)


async def too_late() -> None:
    offer = await note.with_options(expires=0.1, countdown=0.2).kiq("an old offer")
    async with app.worker():
        try:
            await offer.result(timeout=30)
        except TaskRevoked as revoked:  # "... was revoked: expired"
            print(await offer.status(), "expired" in str(revoked), "an old offer" in ran)


async def urgent() -> None:
    for priority in (0, 9, 5):
        await note.with_options(priority=priority).kiq(f"priority {priority}")
    await app.worker(concurrency=1, burst=True).run()
    print(ran[-3:])


async def shared() -> None:
    weights = {"critical": 6, "default": 3, "low": 1}
    for queue in weights:
        await app.kiq_many([note.with_options(queue=queue).s(queue)] * 10)
    await app.worker(queues=weights, concurrency=1, burst=True).run()
    print(dict(Counter(ran[-30:-20])), "of the first ten")


async def main() -> None:
    async with app:
        await later()
        await too_late()
        await urgent()
        await shared()


if __name__ == "__main__":
    asyncio.run(main())
