"""Messages as files: their names, states and marks.

Theory of operation. Each message is one file, and its folder is its state: waiting, held or dead.
Each change of state is one rename, or one call of `apply`. The number of a message is assigned when
it is stored, and names sort by it. So a message that is handed back precedes all messages that were
stored later. Its name and the clock tell whether it is delayed, expired or a suspect.

Cancelling puts a mark on an id and does not look for waiting messages. A marked message is deleted
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
from aiotaskq_folder.connection import FolderConnection, Step
from aiotaskq_folder.notify import MESSAGES

AT_ONCE = 100  # messages that one call takes back, and dead letters that it drops
CALL_TIME, UNIQUE_TIME, CANCELLED_TIME = 60.0, 86_400.0, 7 * 86_400.0  # seconds that marks last
_NAME = re.compile(r"(\d)-(\d{20})-(\d+)-(\d+)-(\d+)", re.ASCII)
_RECEIPT = re.compile(rf"\d{{20}}\.{_NAME.pattern}\.[^.].*", re.ASCII)
_LATEST = 1e10  # Unix time, in the year 2286
_LONGEST = 160  # bytes of the quoted name of a queue, which is a part of file names


class StoredMessage(msgspec.Struct):
    """The content of the file of a message."""

    id: str
    body: bytes
    crash_note: str = ""


class MessageName(NamedTuple):
    """The name of the file of a waiting message."""

    level: int  # 9 minus the priority
    number: int
    due: int  # microseconds; 0: not delayed
    expires: int  # microseconds; 0: never
    crashes: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the parts of a name; None if it is not the name of a message."""
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
        Unsupported: The name of the queue is too long.
    """
    name = quote(queue, safe="")
    if len(name) > _LONGEST:
        raise Unsupported(f"the quoted name of a queue has {_LONGEST} bytes at most")
    return f"{name}.queue"


def queue_of(folder: str) -> str:
    """Return the name of the queue that a folder belongs to."""
    return unquote(folder.removesuffix(".queue"))


def hashed(text: str) -> str:
    """Return a file name for any text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def store(folder: FolderConnection, batch: Iterable[Envelope]) -> list[Step]:
    """Write the files of envelopes and return the steps that store them."""
    now, steps = folder.clock(), list[Step]()
    for one in batch:
        due = one.not_before if one.delay is None else now + one.delay
        expires = one.expires_at if one.expires_in is None else now + one.expires_in
        name = MessageName(
            level=9 - min(9, max(0, one.priority)),
            number=folder.number(),
            due=0 if due is None or due <= now else _microseconds(due) + 1,  # never too early
            expires=0 if expires is None else _microseconds(expires),
            crashes=0,
        )
        file = folder.write(StoredMessage(one.id, one.body))
        steps.append((file, f"waiting/{folder_of(one.queue)}/{name}"))
    return steps


def _microseconds(at: float) -> int:
    # Any time must fit into a file name: a rename that always fails would block the journal.
    return int(min(max(at, 1e-6), _LATEST) * 1e6)


def waiting(folder: FolderConnection, queue: str) -> list[MessageName]:
    """Return the waiting messages of a queue, by priority and age."""
    names = map(MessageName.parse, folder.names(f"waiting/{folder_of(queue)}"))
    return [name for name in names if name is not None]


def held(folder: FolderConnection, consumer: str) -> list[str]:
    """Return the receipts of the messages that a consumer holds, in the order of hand-out."""
    return [name for name in folder.names(f"held/{consumer}") if _RECEIPT.fullmatch(name)]


def hand_back(consumer: str, receipt: str, crashes: int = 0) -> Step:
    """Return the step that puts a held message back, with `crashes` added to its count."""
    _, text, queue = receipt.split(".", 2)
    name = MessageName.parse(text)
    assert name is not None  # see `_RECEIPT`
    name = name._replace(crashes=name.crashes + crashes)
    return f"held/{consumer}/{receipt}", f"waiting/{queue}/{name}"


def fence(folder: FolderConnection, consumer: str, note: str) -> None:
    """Give a consumer up for dead: from now on it cannot change anything."""
    fenced = folder.write(note), f"fenced/{consumer}"
    folder.apply([fenced, (f"consumers/{consumer}", None)])


def take_back(folder: FolderConnection, consumer: str) -> int:
    """Take back messages of a fenced consumer, `AT_ONCE` at most, and return their number."""
    note = folder.read(f"fenced/{consumer}", str) or ""
    steps: list[Step] = []
    receipts = held(folder, consumer)
    for file, target in [hand_back(consumer, one, crashes=1) for one in receipts[:AT_ONCE]]:
        message = folder.read(file, StoredMessage)
        if message is not None:
            message.crash_note = note
            steps += [(folder.write(message), target), (file, None)]
    folder.apply(steps)
    if len(receipts) <= AT_ONCE:
        folder.move([(f"fenced/{consumer}", None)])
    folder.wake(MESSAGES)
    return len(steps) // 2


def mark(kind: str, text: str) -> str:
    """Return the file that marks an id."""
    return f"marks/{kind}-{hashed(text)}"


def put_mark(
    folder: FolderConnection, file: str, seconds: float, content: list[str] | None = None
) -> Step:
    """Write a mark that lasts for some seconds, and return the step that puts it in place."""
    return folder.write(content, until=folder.clock() + seconds), file


def is_marked(folder: FolderConnection, file: str) -> bool:
    """Return whether a mark is in place."""
    return folder.until(file) > folder.clock()
