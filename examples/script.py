"""A script that sends tasks and waits for them. Start `aiotaskq worker script:app` first."""

import time

from aiotaskq import TaskQueue

app = TaskQueue("script")


@app.task
def count_words(text: str) -> int:
    time.sleep(0.1)  # a plain function may block: it runs in a thread of the worker
    return len(text.split())


if __name__ == "__main__":
    lines = ["one", "two words", "now three words"]
    results = [count_words.delay(line) for line in lines]
    for line, result in zip(lines, results, strict=True):
        print(f"{line!r} has {result.get(timeout=30)}")
