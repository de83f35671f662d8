"""SQL statements of the driver, by table, as templates for `PostgresNames.render`.

Above each statement stands what it does, and why it locks as it does. The rules they share:

- The current time is the server's at the beginning of the statement, plus the offset of the clock
  for tests, which is the first parameter of a statement that needs it.
- Statements that may lock the same rows lock them in the same order, so that none waits for
  another in a circle.
- Background work skips rows that somebody else has locked (SKIP LOCKED); the next round finds them.
- A consumer's row is locked FOR KEY SHARE while it fetches. Renewing its lease or changing its
  waiting flag does not wait for that lock. Fencing changes a column of a unique index, and so waits
  until the fetch is committed; the messages that it took are then taken back with the others.
"""
