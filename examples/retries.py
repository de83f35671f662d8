"""Tasks that run again: by a `Retry`, by raising an exception, and as in Celery."""

import asyncio
from typing import Any

from aiotaskq import Reject, Retry, RetryLater, Snooze, Task, TaskQueue, current_task

app = TaskQueue("retries", broker="memory://")


@app.task(retry=Retry(max_attempts=4, delay=0.1, on=(ConnectionError,)))
async def fetch(url: str) -> str:
    attempt = current_task().attempt
    if attempt < 3:
        raise ConnectionError(f"{url} does not answer")
    return f"fetched at attempt {attempt}"


@app.task
async def export(rows: int) -> str:
    if current_task().attempt == 1:
        raise RetryLater(0.1, "the table is locked")  # counts as an attempt
    return f"exported {rows} rows"


doors = iter(["closed", "closed", "open"])


@app.task
async def deliver(parcel: str) -> str:
    if next(doors) == "closed":
        raise Snooze(0.1, "nobody is at home")  # does not count
    return f"delivered {parcel} at attempt {current_task().attempt}"


@app.task
async def refund(order: int) -> None:
    raise Reject(f"order {order} was never paid")  # to the dead letters, at once


@app.task(bind=True, max_retries=5, default_retry_delay=0.1)
async def pay(self: Task[..., Any], order: int) -> str:
    try:
        if self.request.retries < 2:
            raise TimeoutError("the bank is slow")
    except TimeoutError as error:
        raise self.retry(exc=error) from error
    return f"paid order {order} after {self.request.retries} retries"


async def main() -> None:
    async with app, app.worker():
        print(await (await fetch.kiq("http://localhost")).result(timeout=30))
        print(await (await export.kiq(3)).result(timeout=30))
        print(await (await deliver.kiq("a book")).result(timeout=30))
        print(await (await pay.kiq(7)).result(timeout=30))

        once = await fetch.with_options(retry=Retry(max_attempts=1)).kiq("http://localhost")
        print((await once.wait(timeout=30)).error)

        told = await (await refund.kiq(8)).wait(timeout=30)
        print(told.error)

        ended = await (await fetch.kiq("http://localhost")).wait(timeout=30)
        for attempt in ended.history:
            print(f"attempt {attempt.number}: {attempt.error}")


if __name__ == "__main__":
    asyncio.run(main())
