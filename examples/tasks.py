"""Tasks on the embedded default: an SQLite file in the working folder, no server."""

from aiotaskq import Retry, TaskQueue

app = TaskQueue("tasks")


@app.task
async def add(x: int, y: int) -> int:
    return x + y


@app.task(retry=Retry(max_attempts=3), timeout=60)
def count_words(text: str) -> int:
    return len(text.split())
