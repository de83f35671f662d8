"""The embedded driver: messages and results in one SQLite file, for all processes of a machine.

==================  ==============================================================
`url`               URLs of SQLite files
`sql`               the tables, and every statement
`spoilt_keys`       keys after which SQLite would have no other
`process_identity`  identities of processes, and whether another one still runs
`notify`            notification between processes: sending and receiving
`database`          the file as one thread sees it: transactions, schema, forks
`connection`        the thread of a database, and the way there from asyncio
`messages`          messages in their table
`lease`             leases of consumers, and giving consumers up
`dead_letters`      dead letters: read, revived, discarded, trimmed
`maintenance`       messages that fall due, lost consumers, rows to remove
`consumer`          one incarnation of a worker, and the messages that it holds
`schedules`         schedules in a table beside the messages
`results`           `SQLiteBackend`
`broker`            `SQLiteBroker`
==================  ==============================================================

``sqlite:///name.db`` is a file in the working folder, ``sqlite:////folder/name.db`` one elsewhere.
Options of the URL: ``synchronous=full`` (what was accepted survives a power cut) or ``normal``
(faster; it survives any crash of a process), and ``busy_timeout``, the seconds to wait while other
processes write.

The file belongs on a local disk: network file systems do not lock as SQLite needs it.
"""

from __future__ import annotations

from aiotaskq.drivers.sqlite.broker import SQLiteBroker
from aiotaskq.drivers.sqlite.results import SQLiteBackend

__all__ = ["SQLiteBackend", "SQLiteBroker"]
