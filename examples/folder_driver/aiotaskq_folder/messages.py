"""Messages as files: names, states and marks.

Theory of operation. A message is one file, and its folder says in which state it is: waiting, held,
or dead. Each change of state is one rename, or one call of `apply`. Its number is given when it is
stored, and names sort by it: a message that is handed back comes before all that were stored later.
Whether it is delayed, expired or to be handed out alone follows from its name and the clock.

To cancel is to mark an id. Messages that wait are not looked for; one whose id is marked is deleted
when its turn comes to be handed out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import NamedTuple, Self
from urllib.parse import quote, unquote

import msgspec

from aiotaskq.contract.message import SUSPECT, Envelope
from aiotaskq.errors import Unsupported
from aiotaskq_folder.connection import PORTION, FolderConnection, Step

CALL_FOR, UNIQUE_FOR, CANCELLED_FOR = 60.0, 86_400.0, 7 * 86_400.0  # seconds that marks last
_NAME = re.compile(r"(\d)-(\d{20})-(\d+)-(\d+)-(\d+)", re.ASCII)
_FAR = 1e10  # seconds: the year 2286
_LONGEST = 160  # bytes of the name of a queue, which is a part of names of files


class Stored(msgspec.Struct):
    """What the file of a message holds."""

    id: str
    body: bytes
    crash_note: str = ""


class Name(NamedTuple):
    """The name of a message that waits."""

    level: int  # 9 less the priority
    number: int
    due: int  # microseconds; 0: it is not delayed
    expires: int  # microseconds; 0: it never does
    crashes: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return what a name says; None if it is none of ours."""
        found = _NAME.fullmatch(text)
        return None if found is None else cls(*map(int, found.groups()))

    @property
    def suspect(self) -> bool:
        return self.crashes >= SUSPECT

    def __str__(self) -> str:
        return f"{self.level}-{self.number:020}-{self.due}-{self.expires}-{self.crashes}"


def folder_of(queue: str) -> str:
    """Return the name of the folder of a queue.

    Raises:
        Unsupported: It would be too long.
    """
    name = quote(queue, safe="")
    if len(name) > _LONGEST:
        raise Unsupported(f"a queue has a name of {_LONGEST} bytes at most, as written in a URL")
    return f"{name}.queue"


def queue_of(folder: str) -> str:
    """Return the queue whose folder has this name."""
    return unquote(folder.removesuffix(".queue"))


def hashed(text: str) -> str:
    """Return the name of a file for any text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def store(folder: FolderConnection, batch: Iterable[Envelope]) -> list[Step]:
    """Write the files of envelopes; return the steps that store them."""
    now, steps = folder.clock(), list[Step]()
    for one in batch:
        due = one.not_before if one.delay is None else now + one.delay
        expires = one.expires_at if one.expires_in is None else now + one.expires_in
        name = Name(
            9 - min(9, max(0, one.priority)),
            folder.number(),
            0 if due is None or due <= now else _microseconds(due) + 1,  # never too early
            0 if expires is None else _microseconds(expires),
            0,
        )
        waiting = f"waiting/{folder_of(one.queue)}/{name}"
        steps.append((folder.write(Stored(one.id, one.body)), waiting))
    return steps


def _microseconds(moment: float) -> int:
    # Whatever it is, it fits into a name: a rename that fails for ever would stop everybody.
    return int(min(max(moment, 1e-6), _FAR) * 1e6)


def waiting(folder: FolderConnection, queue: str) -> list[Name]:
    """Return the messages that wait in a queue, in their order."""
    names = folder.names(f"waiting/{folder_of(queue)}")
    return [name for name in map(Name.parse, names) if name is not None]


def back(consumer: str, receipt: str, crashes: int = 0) -> Step:
    """Return the step that hands a held message back, with so many crashes more."""
    _, text, queue = receipt.split(".", 2)
    name = Name.parse(text)
    assert name is not None  # checked when it was handed out
    name = name._replace(crashes=name.crashes + crashes)
    return f"held/{consumer}/{receipt}", f"waiting/{queue}/{name}"


def fence(folder: FolderConnection, consumer: str, note: str) -> None:
    """Give a consumer up for dead: from now on it can change nothing."""
    fenced = folder.write(note), f"fenced/{consumer}"
    folder.apply([fenced, (f"consumers/{consumer}", None)])


def take_back(folder: FolderConnection, consumer: str) -> int:
    """Take back what a consumer held that was given up; return how many, a portion at most."""
    note = folder.read(f"fenced/{consumer}", str) or ""
    steps: list[Step] = []
    receipts = folder.names(f"held/{consumer}")
    for held, target in [back(consumer, one, 1) for one in receipts[:PORTION]]:
        if (stored := folder.read(held, Stored)) is not None:
            stored.crash_note = note
            steps += [(folder.write(stored), target), (held, None)]
    folder.apply(steps)
    if len(receipts) <= PORTION:
        folder.move([(f"fenced/{consumer}", None)])
    if steps:
        folder.wake("messages")
    return len(steps) // 2


def mark(kind: str, text: str) -> str:
    """Return the file that marks an id."""
    return f"marks/{kind}-{hashed(text)}"


def put_mark(
    folder: FolderConnection, file: str, seconds: float, content: list[str] | None = None
) -> Step:
    """Return the step that marks an id for some seconds."""
    return folder.write(content, until=folder.clock() + seconds), file


def is_marked(folder: FolderConnection, file: str) -> bool:
    """Whether an id is marked."""
    return folder.until(file) > folder.clock()
