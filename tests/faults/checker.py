"""The checker: finds the problems of a history, after Jepsen's total-queue checker.

It is a function of recorded facts alone: the same facts give the same verdict.

===  ==============================================================================================
U1   each acknowledged task has ended: with an outcome, or as a dead letter
U2   only tasks that were sent ran or ended
U3   a final outcome never changes, and before a success there was a run that returned
U4   a second run of the same attempt is explained by a fault that hit one of the two
U5   all tasks ended within some time after the last fault, and no message is left in the queues
U6   no key stays for ever, and no row is left, except those that are meant to
U7   no process is left
U8   attempts of a task begin in their order
U9   a worker that was unhealthy is healthy at the end
U10  logs have no tracebacks, except those of errors on purpose
===  ==============================================================================================
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from tests.faults.ledger import (
    Acknowledged,
    Attempted,
    Down,
    Ended,
    Fault,
    Line,
    Record,
    Said,
    Sampled,
    Started,
)

R = TypeVar("R", bound=Record)

OK, FAILED, DEAD, REVOKED = "ok", "failed", "dead", "revoked"
ENDINGS: Mapping[str, frozenset[str]] = {
    "failing": frozenset({FAILED}),
    "poison": frozenset({DEAD}),
    "crash": frozenset({FAILED}),
    "hostile": frozenset({FAILED}),
    "swallower": frozenset({FAILED}),
    "deaf": frozenset({FAILED}),
}
"""The possible ends, by task, of tasks that do not succeed."""

_STATUS = {"SUCCESS": OK, "FAILURE": FAILED, "REVOKED": REVOKED}
_SHOWN = 8  # examples of each problem

# Errors that tasks raise on purpose, and the errors of limits and lost processes.
PLANNED = (
    r"tests\.faults\.application\.\w+",
    r"(aiotaskq\.\S+\.)?(TimedOut|TimeLimitExceeded|ProcessDied|EncodeError|PayloadTooLarge)",
    r"SystemExit",
)


class Final(msgspec.Struct, frozen=True):
    """An outcome at the end."""

    status: str
    value: object = None


class Letter(msgspec.Struct, frozen=True):
    """A dead letter at the end."""

    task_id: str
    reason: str


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All facts at the end of a history."""

    lines: Sequence[Line]  # in order of time
    lease: float  # seconds; of the workers
    outcomes: Mapping[str, Final] = {}  # final ones, by task id
    letters: Sequence[Letter] = ()
    waiting: Mapping[str, int] = {}  # messages left, by queue and state
    drained: float | None = None  # the end of the last task, by the clock of the ledger
    leftovers: Sequence[str] = ()  # keys and rows that should be gone
    logs: Mapping[str, str] = {}  # logs by name
    alive: Sequence[str] = ()  # processes that should have ended


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """Problems that are allowed in one scenario."""

    endings: Mapping[str, frozenset[str]] = {}  # by task, in place of those of `ENDINGS`
    errors: Sequence[str] = ()  # patterns of exceptions in logs
    drain: float = 60.0  # seconds from the last fault to the end of the last task
    duplicates: int | None = None  # the largest number of second runs, explained ones included
    lost: bool = False  # acknowledged tasks may be lost: the server was told to forget


class Verdict(msgspec.Struct, frozen=True):
    """The problems and figures of a history."""

    problems: Sequence[str]
    counts: Mapping[str, float]

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {number:g}" for name, number in self.counts.items())
        return "\n".join([figures, *(f"- {problem}" for problem in self.problems)])


class _History:
    """The facts of a history, indexed for the checks."""

    def __init__(self, facts: Facts, allowed: Allowed) -> None:
        self.facts = facts
        self.allowed = allowed
        self.attempted = {line.key: line for line in self.of(Attempted)}
        self.acked = {line.key: line.task_id for line in self.of(Acknowledged)}
        self.faults = self.of(Fault)
        self.runs: dict[str, list[Started]] = defaultdict(list)
        for line in self.of(Started):
            self.runs[line.key].append(line)
        self.returned = {line.key for line in self.of(Ended) if line.how == "returned"}
        # An id is known if it was acknowledged, chosen by the sender, or recorded by a run.
        self.ids = {line.key: line.task_id for line in self.attempted.values() if line.task_id}
        self.ids.update({key: runs[0].task_id for key, runs in self.runs.items()})
        self.ids.update(self.acked)
        self.keys = {task_id: key for key, task_id in self.ids.items()}
        self.dead = {letter.task_id for letter in facts.letters}

    def of(self, kind: type[R]) -> list[R]:
        return [line for line in self.facts.lines if isinstance(line, kind)]

    def ending(self, task_id: str) -> str | None:
        """Return the end of a task; None if it has none."""
        if task_id in self.dead:
            return DEAD
        outcome = self.facts.outcomes.get(task_id)
        return None if outcome is None else _STATUS.get(outcome.status, outcome.status)

    def duplicates(self) -> Iterable[tuple[Started, Started]]:
        """Yield each second run of an attempt, after the run before it."""
        for runs in self.runs.values():
            last: dict[int, Started] = {}
            for run in runs:
                if run.attempt in last:
                    yield last[run.attempt], run
                last[run.attempt] = run

    def explained(self, first: Started, second: Started) -> bool:
        """Return whether a fault before the second run may have hit the first one.

        Or a fault stopped the worker of the second run, which held the task and woke up too late.
        """
        lease = self.facts.lease
        return any(
            (
                fault.at <= second.at
                and first.at <= fault.until + lease
                and (not fault.pids or first.pid in fault.pids)
            )
            or (
                fault.at <= first.at
                and second.at <= fault.until + lease
                and second.pid in fault.pids
            )
            for fault in self.faults
        )


def check(facts: Facts, allowed: Allowed | None = None) -> Verdict:
    """Return all problems, and the figures of the history."""
    history = _History(facts, allowed or Allowed())
    problems = [problem for look in _LOOKS for problem in look(history)]
    return Verdict(problems, _count(history))


def _count(history: _History) -> dict[str, float]:
    acked, ids = history.acked, history.ids
    endings = Counter(history.ending(task_id) for task_id in ids.values())
    dups = list(history.duplicates())
    last = max((fault.until for fault in history.faults), default=None)
    drained = history.facts.drained
    return {
        "attempted": len(history.attempted),
        "acknowledged": len(acked),
        **{str(name): number for name, number in sorted(endings.items(), key=str) if name},
        "lost": sum(history.ending(task_id) is None for task_id in acked.values()),
        "recovered": sum(
            key not in acked and history.ending(task_id) is not None for key, task_id in ids.items()
        ),
        "second runs": len(dups),
        "faults": len(history.faults),
        "seconds to drain": round(drained - last, 1) if drained and last else 0.0,
    }


def _lost(history: _History) -> Iterable[str]:
    lost = [key for key, task_id in history.acked.items() if history.ending(task_id) is None]
    if lost and not history.allowed.lost:
        yield _told("U1: acknowledged and never ended", history, lost)


def _endings(history: _History) -> Iterable[str]:
    wrong = defaultdict(list)
    for key, task_id in history.ids.items():
        sent, ending = history.attempted.get(key), history.ending(task_id)
        if sent is None or ending is None:
            continue
        right = history.allowed.endings.get(sent.task) or ENDINGS.get(sent.task) or {OK}
        if ending not in right:
            wrong[f"{sent.task} ended {ending}, not {'/'.join(sorted(right))}"].append(key)
    for what, keys in wrong.items():
        yield _told(f"U1: {what}", history, keys)


def _unexpected(history: _History) -> Iterable[str]:
    unknown = [key for key in history.runs if key not in history.attempted]
    if unknown:
        yield _told("U2: ran, and nobody sent it", history, unknown)
    ended = {*history.facts.outcomes, *history.dead} - set(history.keys)
    if ended:
        yield f"U2: {len(ended)} ended that nobody sent: {sorted(ended)[:_SHOWN]}"


def _changed(history: _History) -> Iterable[str]:
    prints: dict[str, list[Sampled]] = defaultdict(list)
    for line in history.of(Sampled):
        if not prints[line.task_id] or prints[line.task_id][-1].print != line.print:
            prints[line.task_id].append(line)
    changed = [task_id for task_id, seen in prints.items() if len(seen) > 1]
    for task_id in changed[:_SHOWN]:
        seen = "; ".join(f"{line.status} {line.print}" for line in prints[task_id])
        yield f"U3: the outcome of {task_id} changed: {seen}"


def _phantoms(history: _History) -> Iterable[str]:
    for task_id, outcome in history.facts.outcomes.items():
        key = history.keys.get(task_id)
        if outcome.status != "SUCCESS" or key is None:
            continue
        if key not in history.returned:
            yield _told("U3: succeeded without a run that returned", history, [key])
        if outcome.value != key:
            yield f"U3: the result of {key} is {outcome.value!r:.100}"


def _second_runs(history: _History) -> Iterable[str]:
    pairs = list(history.duplicates())
    wrong = [second.key for first, second in pairs if not history.explained(first, second)]
    if wrong:
        yield _told("U4: ran twice without a fault that explains it", history, wrong)
    most = history.allowed.duplicates
    if most is not None and len(pairs) > most:
        keys = [second.key for _, second in pairs]
        yield _told(f"U4: {len(pairs)} second runs, more than {most}", history, keys)


def _undrained(history: _History) -> Iterable[str]:
    left = {name: number for name, number in history.facts.waiting.items() if number}
    if left:
        yield f"U5: left in the queues: {left}"
    last = max((fault.until for fault in history.faults), default=None)
    drained = history.facts.drained
    if last is not None and drained is not None and drained - last > history.allowed.drain:
        yield f"U5: it took {drained - last:.1f} s to drain, not {history.allowed.drain:g}"


def _leftovers(history: _History) -> Iterable[str]:
    left = history.facts.leftovers
    if left:
        yield f"U6: {len(left)} leftovers: {list(left)[:_SHOWN]}"


def _alive(history: _History) -> Iterable[str]:
    if history.facts.alive:
        yield f"U7: processes left: {list(history.facts.alive)}"


def _out_of_order(history: _History) -> Iterable[str]:
    wrong = []
    for key, runs in history.runs.items():
        for index, run in enumerate(runs):
            later = [before for before in runs[:index] if before.attempt > run.attempt]
            if later and not history.explained(run, run):
                wrong.append(key)
    if wrong:
        yield _told("U8: an attempt began after a later one", history, wrong)


def _unhealthy(history: _History) -> Iterable[str]:
    last: dict[int, Said] = {}
    for line in history.of(Said):
        if line.event == "HealthChanged":
            last[line.pid] = line
    gone = {pid for fault in history.faults for pid in fault.pids}
    drained = history.facts.drained or 0.0
    gone |= {
        line.pid for line in history.of(Down) if line.at < drained
    }  # another process took its place
    for pid, line in last.items():
        if "'problems': '()'" not in line.note and pid not in gone:
            yield f"U9: worker {pid} stayed unhealthy: {line.note}"


_HEADER = "Traceback (most recent call last):\n"
# A header, indented or empty lines, and the line that names the exception.
_ONE = re.escape(_HEADER) + r"(?:[ \t].*\n|\n)*"
_TRACEBACK = re.compile(rf"{_ONE}(?P<error>[^\s:]+)")
_LINK = rf"{_ONE}\S.*\n(?:.*\n)??\n(?:The above exception|During handling).*\n\n"
_NEVER = re.compile(r"(was never (?:retrieved|awaited)|Task was destroyed but it is pending)")


def _loud_logs(history: _History) -> Iterable[str]:
    allowed = re.compile("|".join([*PLANNED, *history.allowed.errors]))
    for name, log in history.facts.logs.items():
        text = _unchained(log)
        for found in _NEVER.finditer(text):
            yield f"U10: in {name}: {_around(text, found.start())}"
        wrong = [
            found
            for found in _TRACEBACK.finditer(text)
            if allowed.fullmatch(found["error"]) is None
        ]
        for found in wrong[:2]:
            yield f"U10: {len(wrong)} tracebacks in {name}: {_around(text, found.start())}"


# Before the name of an exception, with its module or of a builtin.
_INDENTED = r"^  (?=(?:\w+\.)+[\w.<>]+(?:: |$)|\w+(?:Error|Exception|Exit|Interrupt)(?:: |$))"


def _unchained(text: str) -> str:
    """Return the last exception of each chain; the others are its causes.

    The lines of an error are indented in the log: see `aiotaskq.readable`.
    """
    text = re.sub(_INDENTED, "", text, flags=re.MULTILINE)
    text = re.sub(_LINK + "(?=Traceback)", "", text)
    return re.sub(_LINK, _HEADER, text)  # an exception that was not raised has no header of its own


def _around(text: str, position: int) -> str:
    before = text.rfind("\n", 0, max(0, position - 1)) + 1
    shown = text[before : position + 3000]
    return "\n".join("    " + line for line in ("\n" + shown).splitlines())


def _told(what: str, history: _History, keys: Sequence[str]) -> str:
    """Describe keys, with all facts of the first few."""
    lines = [f"{what}: {len(keys)}"]
    for key in keys[:_SHOWN]:
        task_id = history.ids.get(key, "?")
        about = [line for line in history.facts.lines if key in (getattr(line, "key", None),)]
        story = " | ".join(_brief(line) for line in about)
        lines.append(f"    {key} ({task_id}, {history.ending(task_id)}): {story}")
    return "\n".join(lines)


def _brief(line: Line) -> str:
    facts = msgspec.structs.asdict(line)
    shown = " ".join(
        f"{name}={facts[name]}" for name in ("task", "attempt", "pid", "how") if name in facts
    )
    return f"{line.at:.3f} {type(line).__name__} {shown}".rstrip()


_LOOKS: Sequence[Callable[[_History], Iterable[str]]] = (
    _lost,
    _endings,
    _unexpected,
    _changed,
    _phantoms,
    _second_runs,
    _undrained,
    _leftovers,
    _alive,
    _out_of_order,
    _unhealthy,
    _loud_logs,
)
