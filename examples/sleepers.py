"""10,000 coroutines that sleep for a second, in one worker process; it takes a few seconds.

Start the worker first: `aiotaskq worker sleepers:app -c 10000 -l warning`.
"""

import asyncio
import time

from aiotaskq import TaskQueue

COUNT = 10_000

app = TaskQueue("sleepers")


@app.task
async def nap(number: int) -> int:
    await asyncio.sleep(1)
    return number


async def main() -> None:
    async with app:
        begin = time.perf_counter()
        handles = await app.kiq_many([nap.s(number) for number in range(COUNT)])
        print(f"sent {COUNT:,} tasks in {time.perf_counter() - begin:.1f} s")
        values = await asyncio.gather(*(handle.result(timeout=120) for handle in handles))
        assert values == list(range(COUNT))
        print(f"all had slept after {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    asyncio.run(main())
