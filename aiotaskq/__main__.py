"""``python -m aiotaskq``."""

from aiotaskq.cli import main

main()
