"""The plan of fetching: from which queues, and how much, while threads or processes are full.

A worker learns only from a message whether its task needs a thread or a process. A queue from which
tasks had to wait is treated with care, and all others as ever::

    open ── a task waits ──▶ held ── it is handed back ──▶ left out ── a slot is free ──▶ narrow
     ▲                        │ ▲                             │                             │
     │                        │ └──── mixed ◀── probe ◀───────┘ time passes                 │
     └── all of them start ───┴──────────────── the window has grown again ◀────────────────┘

- *Held*: what waits is held for a moment. Short tasks start meanwhile, and nothing else happens.
- *Left out*: nothing is fetched from the queue. Other workers get its tasks. When a slot is free,
  the best of them comes first.
- *Narrow*: a fetch takes no more than its *window*. That is the number of tasks that could be
  started lately; it doubles with each fetch of which nothing has to wait.
- *Probe*: once in a while one fetch looks whether tasks for which there are slots are behind those
  that have to wait, if the worker has such tasks. Then the queue is *mixed*: the others are
  held for longer, so that these get past them, and the queue is left out for a few milliseconds
  only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from aiotaskq.backoff import doubled
from aiotaskq.tasks.option_table import Executor
from aiotaskq.worker.execution import Execution

_PROBES = (0.1, 0.5)  # seconds for which a queue is left out: the first time, and the longest
_RARELY = 5.0  # the same where all tasks of the worker wait for the same slots
_SHALLOW = 16  # the most that a probe takes, but for
_DEEP = 4  # each fourth one in a row that finds nothing
_GAP = 0.02  # the same for a mixed queue: other workers need only a moment to take what they can


@dataclass(slots=True)
class _QueueState:
    """The state of a queue from which tasks had to wait.

    Attributes:
        window: The most that a fetch may take from it.
        fruitless: Times in a row that it was left out without being mixed.
        needs: The executors that its tasks wait for, or waited for when they were handed back.
        left_out_until: The time of its next probe; None: it is not left out.
        probing: Whether the fetch that is under way is a probe.
        started: Tasks of it that could start since some were handed back.
        mixed: Whether some of them started while others waited.
    """

    window: int
    fruitless: int = 0
    needs: set[Executor] = field(default_factory=set)
    left_out_until: float | None = None
    probing: bool = False
    started: int = 0
    mixed: bool = False


class FetchPlan:
    """The plan of one incarnation.

    Args:
        most: The most that any fetch takes.
        executors: Those of all tasks that the worker knows.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        most: int,
        executors: Iterable[Executor],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._executors = frozenset(executors)
        self._clock = clock
        self._states: dict[str, _QueueState] = {}

    @property
    def is_open(self) -> bool:
        """Return whether all queues are open, so that there is nothing to plan."""
        return not self._states

    @property
    def narrowest(self) -> int:
        """The most that a fetch from all queues at once may take."""
        return min((state.window for state in self._states.values()), default=self._most)

    def calls(self, queues: Sequence[str]) -> list[tuple[list[str], int]]:
        """Return the fetches that may be made now: their queues, and the most of each.

        Args:
            queues: All queues, in the order in which they are to be drained.
        """
        calls: list[tuple[list[str], int]] = []
        before_is_open = False
        for queue in queues:
            state = self._states.get(queue)
            most = self._most if state is None else self._window(state)
            if most == 0:
                continue
            is_open = state is None or (most == self._most and not state.probing)
            if is_open and before_is_open:
                calls[-1][0].append(queue)
            else:
                calls.append(([queue], most))
            before_is_open = is_open
        return calls

    def _window(self, state: _QueueState) -> int:
        if state.left_out_until is None:
            return state.window
        if self._clock() < state.left_out_until:
            return 0
        state.left_out_until, state.probing = None, True
        return min(_SHALLOW, self._most) if state.fruitless % _DEEP else self._most

    @property
    def may_wait(self) -> bool:
        """Return whether a fetch may wait: no queue is left out, and none is probed now."""
        return not any(
            state.probing or state.left_out_until is not None for state in self._states.values()
        )

    def next_probe(self) -> float | None:
        """Return the seconds until a queue is no longer left out; None: none is left out."""
        ends = [one.left_out_until for one in self._states.values()]
        first = min((end for end in ends if end is not None), default=None)
        return None if first is None else max(0.0, first - self._clock())

    def accepted(self, queue: str, waits_for: Executor | None) -> None:
        """Note a delivery that was accepted, and the executor that it waits for, if it does."""
        state = self._states.get(queue)
        if waits_for is not None:
            if state is None:
                state = self._states[queue] = _QueueState(self._most)
            state.needs.add(waits_for)
        elif state is not None:
            state.started += 1
            if state.needs and state.left_out_until is None:
                state.mixed, state.window = True, self._most

    def fetched(self, queues: Iterable[str]) -> set[Executor]:
        """Note that a fetch was made and its deliveries accepted.

        Returns:
            The executors for which nothing is to wait any more: a probe has found nothing.
        """
        fruitless: set[Executor] = set()
        for queue in queues:
            state = self._states.get(queue)
            if state is None or state.left_out_until is not None:
                continue
            if state.probing and not state.mixed:
                fruitless |= state.needs
            state.probing = False
            if not state.needs:
                self._widen(queue, state)
        return fruitless

    def _widen(self, queue: str, state: _QueueState) -> None:
        state.window = min(2 * state.window, self._most)
        if state.window == self._most:
            del self._states[queue]

    def is_mixed(self, executor: Executor) -> bool:
        """Return whether tasks get past those that wait for an executor."""
        return any(one.mixed and executor in one.needs for one in self._states.values())

    def handed_back(self, executor: Executor, executions: Iterable[Execution]) -> None:
        """Note executions that did not start soon. Their queues are left out for a while."""
        back = {one.delivery.queue for one in executions}
        for queue, state in self._states.items():
            if queue in back:
                state.fruitless = 0 if state.mixed else state.fruitless + 1
                state.left_out_until = self._clock() + self._pause(state)
                state.window = max(1, min(state.started, self._most))
                state.started, state.mixed, state.probing = 0, False, False
            elif state.left_out_until is None:
                state.needs.discard(executor)  # nothing of it waits here

    def _pause(self, state: _QueueState) -> float:
        if not state.fruitless:
            return _GAP
        if self._executors <= state.needs:  # nothing could get past the others
            return _RARELY
        return min(doubled(_PROBES[0], state.fruitless - 1), _PROBES[1])

    def freed(self, executor: Executor) -> None:
        """Note that an executor has a free slot, and that nothing waits for it here."""
        for state in self._states.values():
            if executor in state.needs:
                state.needs.discard(executor)
                state.left_out_until = None
