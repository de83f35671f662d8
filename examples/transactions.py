"""Tasks sent in the transaction of a row, and writing in the transaction of their result."""

import asyncio
import os

import asyncpg

from aiotaskq import TaskQueue, current_task

DATABASE = os.environ.get("DATABASE_URL", "postgresql://postgres:postgres@localhost/postgres")

app = TaskQueue("shop", broker=DATABASE)


@app.task
async def charge(order: int) -> str:
    connection = await current_task().transaction()
    await connection.execute("UPDATE orders SET charged = true WHERE id = $1", order)
    return f"order {order} charged"  # committed together with this result


async def place(pool: asyncpg.Pool, *, fails: bool) -> int:
    async with pool.acquire() as connection, connection.transaction():
        order = await connection.fetchval("INSERT INTO orders DEFAULT VALUES RETURNING id")
        await charge.with_options(connection=connection, task_id=f"charge-{order}").kiq(order)
        if fails:
            raise ValueError("sold out")
    return int(order)


async def main() -> None:
    async with asyncpg.create_pool(DATABASE, min_size=0) as pool, app, app.worker():
        await pool.execute("CREATE TABLE orders (id serial, charged boolean DEFAULT false)")
        try:
            await place(pool, fails=True)
        except ValueError as error:
            print(f"{error}: neither an order nor a task")
        order = await place(pool, fails=False)
        print(await app.handle(f"charge-{order}").result(timeout=30))
        print(await pool.fetchval("SELECT count(*) FROM orders WHERE charged"), "charged")


if __name__ == "__main__":
    asyncio.run(main())
