"""Other task queues under the same load: ``make bench-compare``.

Each library has a folder with its `requirements.txt` (or `package.json`), its `bench.py` (or
`bench.js`) and its `rival.toml`. A `bench` runs in the virtual environment of its library and does
not import aiotaskq; aiotaskq itself has a folder of the same form. `protocol` has the commands of a
`bench`, and `workloads` the tasks. `contestants` installs the libraries, `drains` measures them
from outside, and `benchmarks.compare` is the command.
"""
