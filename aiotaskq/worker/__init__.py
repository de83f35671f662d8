"""The worker: takes deliveries, runs them, stores what came of them, settles them.

::

    worker ─── one life: lifespans, connections, signals to stop
      └─ incarnation ─── one lease at the broker; a lost one is followed by a new one
           ├─ heartbeat     a thread that keeps the lease alive beside the event loop
           ├─ fetching      as many deliveries as there are free slots
           ├─ executor      one delivery → one settlement, and its outcome
           │    ├─ threads      plain functions
           │    └─ processes    plain functions that ask for a process
           └─ completer     stores outcomes, then settles, in batches
"""

from aiotaskq.worker.worker import Worker

__all__ = ["Worker"]
