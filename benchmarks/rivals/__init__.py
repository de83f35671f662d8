"""Other task queues under the same load: ``make bench-compare``.

Each has a folder with its `requirements.txt` (or `package.json`), its `bench.py` (or `bench.js`)
and its `rival.toml`. A `bench` runs inside the virtual environment of its rival and knows nothing
of aiotaskq; aiotaskq itself has one of the same shape. `protocol` is what they share, `workloads`
what they run. `contestants` installs them, `drains` measures them from outside,
`benchmarks.compare` is the command.
"""
