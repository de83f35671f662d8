"""A middleware that adds the name of the sender, and an observer that counts failures."""

import getpass
import logging
import time
from collections import Counter
from typing import Any

from msgspec.structs import replace

from aiotaskq import Message, Middleware, TaskContext, TaskQueue, events
from aiotaskq.middleware import Run, Send

logger = logging.getLogger("middleware")


class Sender(Middleware):
    """Adds the sender to each task, and logs it with the duration of the task."""

    async def send(self, message: Message, proceed: Send) -> None:
        await proceed(replace(message, headers={**message.headers, "sender": getpass.getuser()}))

    async def run(self, context: TaskContext, proceed: Run) -> Any:
        begin = time.perf_counter()
        try:
            return await proceed(context)
        finally:
            took = time.perf_counter() - begin
            logger.info("%s for %s took %.3f s", context.name, context.headers["sender"], took)


app = TaskQueue("middleware", middlewares=[Sender()])
failures: Counter[str] = Counter()


@app.on(events.Failed)
def count(event: events.Failed) -> None:
    failures[event.message.task] += 1
    logger.info("%s has failed %d times", event.message.task, failures[event.message.task])


@app.task
async def divide(x: float, y: float) -> float:
    return x / y
