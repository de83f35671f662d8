"""Soft and hard time limits, and cancelling."""

import asyncio

from aiotaskq import SoftTimeLimitExceeded, TaskQueue

app = TaskQueue("limits", broker="memory://")


@app.task(soft_timeout=0.2, timeout=30)
async def crawl(pages: int) -> str:
    done = 0
    try:
        for _ in range(pages):
            await asyncio.sleep(0.05)
            done += 1
    except SoftTimeLimitExceeded:  # raised where the task waits
        return "some pages" if done else "no page"
    return "all pages"


@app.task(timeout=0.2)
async def wait_for_ever() -> None:
    await asyncio.Event().wait()


@app.task(soft_timeout=0.2, timeout=30)
def count() -> str:  # in a thread
    number = 0
    try:
        while True:
            number += 1
    except SoftTimeLimitExceeded:  # raised between two instructions
        return "counted for a while"


@app.task(executor="process", timeout=1)
def spin() -> None:
    while True:  # its process is ended, even if this were C code
        pass


asleep = asyncio.Event()


@app.task
async def sleep(seconds: float) -> None:
    asleep.set()
    try:
        await asyncio.sleep(seconds)
    finally:
        print("cleaned up")


async def main() -> None:
    async with app, app.worker():
        print(await (await crawl.kiq(1000)).result(timeout=60))
        print(await (await count.kiq()).result(timeout=60))

        for task in (wait_for_ever, spin):
            ended = await (await task.kiq()).wait(timeout=60)
            print(f"{task.name}: {ended.error}")

        later = await sleep.with_options(countdown=3600).kiq(1)
        await later.cancel()  # it never starts
        print(await later.status())

        running = await sleep.kiq(3600)
        await asleep.wait()
        await running.cancel()  # it is cancelled where it waits
        print(await running.status())


if __name__ == "__main__":
    asyncio.run(main())
