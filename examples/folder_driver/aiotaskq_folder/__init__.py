"""A driver for aiotaskq that keeps messages and results in a folder: `folder:///path/to/folder`.

============  ========================================================================
`connection`  access to the folder: the thread, the lock, changes of several files in one step
`notify`      wake-ups of waiting consumers and subscribers in all processes
`messages`    messages as files: their names, states and marks
`broker`      `FolderBroker`
`consumer`    `FolderConsumer` and `FolderLease`
`schedules`   `FolderSchedules`
`results`     `FolderBackend`
============  ========================================================================

The files below ``<folder>/<prefix>/``. Their content is JSON, except for ``lock``. A time is kept
as the mtime of a file.

===============================  ===========================================================
``lock``                         the file lock; it also holds the last number that was given
``journal``                      a change of several files that is in progress
``new/<random>``                 a file that is being written and does not count yet
``waiting/<queue>/<name>``       a message that waits, delayed or not
``held/<consumer>/<receipt>``    a message that was handed out to a consumer
``dead/<queue>/<number>``        a dead letter
``consumers/<consumer>``         a living consumer; the mtime is the end of its lease
``fenced/<consumer>``            the crash note of a consumer that was given up
``marks/<kind>-<hash>``          an id that was cancelled (kind ``cancelled``), a unique id that was
                                 stored (``unique``), or the id of a call of `publish` (``call``);
                                 the mark holds until its mtime
``schedules/<hash of the id>``   a schedule
``results/<hash of the id>``     an outcome; it expires at its mtime, or never if that is 0
``wake/<topic>/<random>``        the named pipe of a waiting consumer or subscriber
``broken/<random>``              a file that could not be decoded
===============================  ===========================================================

``<queue>`` is the name of the queue, quoted as in a URL, with ``.queue`` appended. ``<name>``
consists of the priority (9 is written as 0, so that names sort), the number of the message, the
times at which it falls due and expires (in microseconds, 0 for none), and the number of crashes.
``<receipt>`` consists of the number of the hand-out, ``<name>`` and ``<queue>``.
"""

from __future__ import annotations

from aiotaskq.drivers import Driver
from aiotaskq_folder.broker import FolderBroker
from aiotaskq_folder.results import FolderBackend

__all__ = ["FolderBackend", "FolderBroker", "driver"]

driver = Driver(broker=FolderBroker, backend=FolderBackend)
