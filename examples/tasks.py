"""Tasks in an SQLite file in the working folder: the default, without a server."""

import asyncio

from aiotaskq import Retry, TaskQueue

app = TaskQueue("tasks")


@app.task
async def add(x: int, y: int) -> int:  # runs on the worker's event loop
    return x + y


@app.task(retry=Retry(max_attempts=3), timeout=60)
def count_words(text: str) -> int:  # runs in a thread of the worker
    return len(text.split())


async def main() -> None:
    async with app:
        handle = await add.kiq(2, 8)  # stored when it returns
        print(await handle.result(timeout=30))

        handles = await app.kiq_many([add.s(n, n) for n in range(5)])  # one round trip
        print(await asyncio.gather(*handles))

        later = await count_words.with_options(countdown=0.5, priority=9).kiq("three short words")
        print(await later.status(), await later.result(timeout=30))


if __name__ == "__main__":
    asyncio.run(main())
