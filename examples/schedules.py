"""Schedules: in the code, in the settings, and made at run time."""

import asyncio
from datetime import datetime, timedelta

from aiotaskq import Schedule, TaskQueue, at, crontab, current_task, every

app = TaskQueue("schedules", broker="memory://", timezone="Europe/Oslo")
looked = asyncio.Queue[str]()


@app.task(schedule=crontab(hour=3, minute=0))  # its id is the task's name
async def clean_up() -> None: ...


@app.task(schedule=Schedule(every(0.2), overlap="skip", misfire="skip"))
async def look() -> None:
    looked.put_nowait(current_task().id)


@app.task
async def report(kind: str, days: int = 1) -> str:
    return f"{kind} of {days} days"


app.conf.beat_schedule = {
    "sales-each-morning": {
        "task": "schedules.report",
        "schedule": crontab(hour=9, minute=0, day_of_week="mon-fri"),
        "args": ("sales",),
        "kwargs": {"days": 7},
    },
}


async def change() -> None:
    await app.schedules.add(
        "stock", report.s("stock"), Schedule(crontab("30 6 * * *"), timezone="Asia/Tokyo")
    )
    await app.schedules.add("new-year", report.s("all"), at(datetime(2999, 1, 1)))
    await app.schedules.pause("stock")
    handle = await app.schedules.run_now("stock")  # at once, paused or not
    print(await handle.result(timeout=30))
    await app.schedules.resume("stock")
    await app.schedules.add("stock", report.s("stock"), timedelta(hours=6), replace=True)
    await app.schedules.remove("new-year")


async def main() -> None:
    async with app, app.worker(), app.scheduler():
        print((await looked.get()).split("@")[0])
        await change()
        for one in await app.schedules.list():
            print(f"{one.id}: {one.when}")


if __name__ == "__main__":
    asyncio.run(main())
