"""The programs of the how-to pages print the expected output."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.running import copied, environment, printed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RETRIES = """\
fetched at attempt 3
exported 3 rows
delivered a book at attempt 1
paid order 7 after 2 retries
http://localhost does not answer
Reject: order 8 was never paid
attempt 1: ConnectionError: http://localhost does not answer
attempt 2: ConnectionError: http://localhost does not answer
"""
TIME_LIMITS = """\
some pages
counted for a while
time_limits.wait_for_ever: TimeLimitExceeded: it ran longer than its timeout of 0.2 s
time_limits.spin: TimeLimitExceeded: it ran longer than its timeout of 1 s
REVOKED
REVOKED
cleaned up
"""
DEAD_LETTERS = """\
Reject: order 1 is not paid
Reject: order 2 is not paid
Reject: order 3 is not paid
dead_letters.ship [3]: order 3 is not paid, after 1 attempt
dead_letters.ship [2]: order 2 is not paid, after 1 attempt
dead_letters.ship [1]: order 1 is not paid, after 1 attempt
retried: 1
order 1 is on its way
dropped: 2
left: 0
"""
DELAYS = """\
['at once', 'after 0.3 s', 'at a moment']
REVOKED True False
['priority 9', 'priority 5', 'priority 0']
{'critical': 6, 'default': 3, 'low': 1} of the first ten
"""
SCHEDULES = """\
schedules.look
stock of 1 days
sales-each-morning: 0 9 * * mon-fri Europe/Oslo
schedules.clean_up: 0 3 * * * Europe/Oslo
schedules.look: every 0.2 s
stock: every 6 h
"""
TRANSACTIONS = """\
sold out: neither an order nor a task
order 2 charged
1 charged
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("retries", RETRIES),
        ("time_limits", TIME_LIMITS),
        ("dead_letters", DEAD_LETTERS),
        ("schedules", SCHEDULES),
        ("delays", DELAYS),
    ],
)
def test_a_program_prints_what_is_shown(name: str, expected: str, tmp_path: Path) -> None:
    folder = copied(f"{name}.py", tmp_path)
    assert printed(f"python {name}.py", folder, environment()) == expected
    assert [path.name for path in folder.iterdir() if path.is_file()] == [f"{name}.py"]


def test_the_program_about_transactions_prints_what_is_shown(
    tmp_path: Path, postgres_url: str
) -> None:
    folder = copied("transactions.py", tmp_path)
    env = environment(DATABASE_URL=postgres_url)
    assert printed("python transactions.py", folder, env) == TRANSACTIONS
