"""The worker: fetches deliveries, runs their tasks, stores the outcomes, settles the deliveries.

::

    worker              one life in one event loop: lifespans, connections, stopping
      ├─ loop monitor   a thread that reports blocks of the event loop
      ├─ health         problems that last, and counts of rare events
      ├─ outbox relay   passes tasks from the outbox on to the broker, if there is an outbox
      ├─ pools          threads and processes for plain functions
      └─ incarnation    one lease at the broker; a lost one is followed by a new one
           ├─ heartbeat       a thread that renews the lease beside the event loop
           ├─ fetching        as many deliveries as there are free slots
           │    ├─ queue rotation   the order of queues that have weights
           │    └─ quarantine       when to make room for a message that crashed workers
           ├─ maintenance     the broker's maintenance, about once a second
           │    └─ census           which tasks other workers know
           ├─ news            cancelled tasks, twice a second
           ├─ executor        one delivery → one execution
           │    └─ endings          one execution → one settlement and one outcome
           └─ completer       stores outcomes, then settles, in batches
"""

from aiotaskq.worker.worker import Worker

__all__ = ["Worker"]
