"""A driver for aiotaskq whose store is a folder: `folder:///path/to/folder`.

============  =====================================================================
`connection`  the folder: its thread, its lock, changes of several files in one step
`notify`      waking those who wait, in whatever process
`messages`    messages as files: names, states, marks
`broker`      `FolderBroker`
`consumer`    `FolderConsumer` and `FolderLease`
`schedules`   `FolderSchedules`
`results`     `FolderBackend`
============  =====================================================================

The files, below ``<folder>/<prefix>/``. All but the first are JSON or empty. Where a time is kept,
it is the mtime of the file.

===============================  ===========================================================
``lock``                         locked by whoever uses the folder; holds the last number given
``journal``                      a change of several files that is under way
``new/<random>``                 a file that is being written, and counts for nothing yet
``waiting/<queue>/<name>``       a message that waits, delayed or not
``held/<consumer>/<receipt>``    a message that was handed out
``dead/<queue>/<number>``        a dead letter
``consumers/<consumer>``         a consumer that is trusted, until the mtime
``fenced/<consumer>``            one that was given up, and may still hold messages: how it died
``marks/<kind>-<hash>``          until the mtime, an id is ``cancelled``, was stored as ``unique``,
                                 or is that of a ``call`` of `publish`
``schedules/<hash of the id>``   a schedule
``results/<hash of the id>``     an outcome, until the mtime; if that is 0, for ever
``wake/<topic>/<random>``        the named pipe of one who waits
``broken/<random>``              a file that could not be read
===============================  ===========================================================

The folder of a queue is its name as in a URL, and ``.queue``. The name of a message is its priority
(9 is written 0, so that names sort), its number, the times at which it falls due and expires (in
microseconds, or 0), and its crashes. A receipt is the number of the hand-out, that name, and the
folder of the queue.
"""

from __future__ import annotations

from aiotaskq.drivers import Driver
from aiotaskq_folder.broker import FolderBroker
from aiotaskq_folder.results import FolderBackend

__all__ = ["FolderBackend", "FolderBroker", "driver"]

driver = Driver(broker=FolderBroker, backend=FolderBackend)
