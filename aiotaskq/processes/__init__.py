"""The processes of a worker: the supervisor, and the process that keeps the leases.

::

    supervisor ─── supervisor.py: the parent; starts, replaces, passes signals on
      ├─ worker processes ─── cli/worker_process.py: each runs one `Worker`
      ├─ lease keeper ─────── lease_keeper_process.py; the supervisor's side is lease_keeper.py
      └─ file watcher ─────── reload.py, both sides; only with --reload

`pipe.py` has the messages between them, `parent.py` how a child notices that its parent has died,
`operating_system.py` how processes are started, signalled and observed, and `standard_streams.py`
how they write to stdout and stderr.
"""
