"""Tests by fault injection: real processes, real servers, faults on purpose, and a checker.

Modules here import aiotaskq as late as possible: a program may have to change the clock first.

===============  ===================================================================================
`ledger`         the history, written by each process into files of its own: neither a server
                 under fault nor SIGKILL can lose it; times are of the monotonic clock, which all
                 processes of a machine share
`application`    the application of the workers: ``aiotaskq worker tests.faults.application:app``;
                 each task records its runs; ``AIOTASKQ_TESTS_FAULTS_DIE`` lets a worker die at an
                 exact point, ``AIOTASKQ_TESTS_FAULTS_LOSSY`` makes it the control that settles
                 before it runs
`later`          the next release of the same application: it knows one more task
`skewed`         the command line with a clock that is wrong by some seconds
`producer`       ``python -m tests.faults.producer``: sends tasks by a seed, and records attempts
                 and acknowledgements
`fleet`          starts and stops these programs; knows the pids of the workers in them
`nemesis`        faults by a seeded schedule, each recorded with the pids that it hit
`observer`       samples outcomes meanwhile, and collects all facts at the end
`checker`        finds the problems of a history, after Jepsen's total-queue checker
`scene`          all of these together, for a test: the fixture `scene` of `conftest.py`; `plays`
                 has steps that several tests share
`proxy`          stands between a client and a server; delays, drops or resets their connections
`servers`        Redis servers with settings of their own, and faults of servers
`bulky`          the application with a task whose results take room
`paying`         the application with a task that writes a row in the transaction of its outcome
===============  ===================================================================================

A test of a fault looks like this::

    async def test_something(scene: Scene) -> None:
        scene.set(max_crashes=50)                              # a setting of the workers
        await scene.fleet.worker("-c", "20", processes=2)      # a supervisor and two workers
        scene.producer(*scene.mix(300), rate=150)
        await scene.nemesis.run([scene.nemesis.kill_worker()], times=5, every=(0.3, 0.8))
        await scene.drain()
        await scene.check(Allowed(...))                        # problems that are allowed here

A fault is an async function of a `random.Random` that returns whether it hit anything; it records
itself with `Nemesis.strike` or `Nemesis.lasting`. A fault that may hit any run, such as that of a
server, has no pids. The checker accepts a second run of a task only where a fault explains it.

Two profiles of the same code: ``smoke`` in `make test`, ``long`` in `make faults`
(``AIOTASKQ_TESTS_FAULTS=long``). In the short one a test that is there for two brokers runs with
one of them, which its name decides. The seed is printed when a test fails;
``AIOTASKQ_TESTS_FAULTS_SEED`` repeats it.
"""
