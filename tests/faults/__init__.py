"""The proof by faults: real processes, real servers, faults on purpose, and a checker.

Nothing here imports aiotaskq before it must, so that a program may change the clock first.

===============  ===================================================================================
`ledger`         what happened, written by every process into files of its own: no server under
                 fault can lose it, nor can SIGKILL; times are of the monotonic clock, which all
                 processes of a machine share
`application`    what the workers run: ``aiotaskq worker tests.faults.application:app``; each task
                 writes its runs down; ``AIOTASKQ_TESTS_FAULTS_DIE`` lets a worker die at an exact
                 point, ``AIOTASKQ_TESTS_FAULTS_LOSSY`` makes it the control that settles first
`later`          the next release of the same application: it knows one more task
`skewed`         the command line with a clock that is wrong by some seconds
`producer`       ``python -m tests.faults.producer``: sends by a seed, and writes down what it tried
                 and what was acknowledged
`fleet`          starts and stops these programs; knows the pids of the workers in them
`nemesis`        faults by a seeded schedule, each written down with the pids that it hit
`observer`       samples outcomes meanwhile, and gathers all that is known at the end
`checker`        what is wrong with that: a function of recorded facts, after Jepsen's total-queue
`scene`          all of it together, for a test: the fixture `scene` of `conftest.py`; `plays` is
                 what several tests do with it
`proxy`          stands between a client and a server, and delays, cuts, resets at a byte, swallows
`servers`        Redis servers with settings of their own, and what is done to them
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
        await scene.check(Allowed(...))                        # what is wrong elsewhere

Any fault may be added: an async function of a `random.Random` that tells whether it hit anything;
it writes itself down by `Nemesis.strike` or `Nemesis.lasting`. A fault that may hit any run, such
as a server's, names no pids. The checker takes a second run of a task only where a fault explains
it.

Two profiles of the same code: ``smoke`` in `make test`, ``long`` in `make faults`
(``AIOTASKQ_TESTS_FAULTS=long``). The seed is printed when a test fails;
``AIOTASKQ_TESTS_FAULTS_SEED`` repeats it.
"""
