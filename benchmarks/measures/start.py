"""Duration of a start, without the start of Python itself.

It is measured for ``import aiotaskq``, and for ``aiotaskq worker`` until it logs that it is ready,
each minus the median of ``python -c pass``. The three take turns. The measurement begins before the
process is created and ends when it has ended, or for the worker when the line is read. The command
is ``python -m aiotaskq``, because the installed script may belong to another Python.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.figures import Figure, Target
from benchmarks.measures.bench import APP, ROOT, Bench, Store

IMPORT = Target(100, most=True)  # milliseconds
READY = Target(600, most=True)
_END = 30.0  # seconds that a worker gets to stop


def measure(bench: Bench) -> Iterator[Figure]:
    """Yield milliseconds."""
    store = bench.redis()
    plain, imports, ready = [], [], []
    for _ in range(bench.runs(10)):
        plain.append(_python("pass"))
        imports.append(_python("import aiotaskq"))
        ready.append(_worker(store))
    alone = statistics.median(plain)
    yield Figure("python -c pass", "ms", plain)
    beyond = [one - alone for one in imports]
    yield Figure("import aiotaskq, beyond that", "ms", beyond, target=IMPORT)
    beyond = [one - alone for one in ready]
    yield Figure("aiotaskq worker until ready, beyond that", "ms", beyond, target=READY)


def _python(program: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    return (time.perf_counter() - started) * 1000


def _worker(store: Store) -> float:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "aiotaskq", "worker", APP],
        cwd=ROOT,
        env=store.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None  # it is a pipe
    with process.stderr:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.endswith(" ready\n"):
                    return (time.perf_counter() - started) * 1000
            raise RuntimeError(f"the worker ended: {''.join(lines)}")
        finally:
            process.terminate()
            try:
                process.communicate(timeout=_END)
            except subprocess.TimeoutExpired:
                process.kill()  # its child processes notice that, and end
                process.wait()
                raise
