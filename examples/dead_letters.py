"""Dead letters: messages that could not succeed are kept, and can run again after a fix."""

import asyncio

from aiotaskq import Reject, TaskQueue

app = TaskQueue("letters", broker="memory://")
paid: set[int] = set()


@app.task
async def ship(order: int) -> str:
    if order not in paid:
        raise Reject(f"order {order} is not paid")
    return f"order {order} is on its way"


async def main() -> None:
    async with app:
        async with app.worker():
            handles = [await ship.kiq(order) for order in (1, 2, 3)]
            for handle in handles:
                print((await handle.wait(timeout=30)).error)

        for one in await app.dead.list(task="*.ship"):
            print(f"{one.task} {one.args}: {one.reason}, after {len(one.attempts)} attempt")

        paid.add(1)
        async with app.worker():
            print("retried:", await app.dead.retry(id=handles[0].id))
            print(await handles[0].result(timeout=30))

        print("dropped:", await app.dead.discard(reason="not paid"))
        print("left:", await app.dead.count())


if __name__ == "__main__":
    asyncio.run(main())
