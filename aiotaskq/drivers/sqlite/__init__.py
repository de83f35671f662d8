"""The embedded driver: messages and results in one SQLite file, for all processes of a machine.

============  ==================================================================
`sql`         the tables, and every statement
`process`     who we are, and whether another process is gone
`caller`      sends wake-ups
`database`    the address, the connection, transactions, the schema
`link`        the thread of a connection, and the way there from asyncio
`wakeups`     receives wake-ups
`messages`    what broker and consumers share
`leases`      signs of life, and who is given up for want of them
`consumer`    one incarnation of a worker, and its lease
`letters`     dead letters
`schedules`   what is sent by the clock
`broker`      `SQLiteBroker`
`results`     `SQLiteBackend`
============  ==================================================================

``sqlite:///name.db`` is a file in the working folder, ``sqlite:////folder/name.db`` one elsewhere.
Options of the URL: ``synchronous=full`` (what was accepted survives a power cut) or ``normal``
(faster; it survives any crash of a process), and ``busy_timeout``, the seconds to wait for
others that write.

The file belongs on a local disk: network file systems do not lock as SQLite needs it.
"""

from __future__ import annotations

from aiotaskq.drivers.sqlite.broker import SQLiteBroker
from aiotaskq.drivers.sqlite.results import SQLiteBackend

__all__ = ["SQLiteBackend", "SQLiteBroker"]
