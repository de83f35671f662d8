"""The client: sends tasks, waits for their outcomes, cancels them, and manages dead letters.

==============  ===================================================================
`prepare`       from a call to a message and its envelope
`send`          calls through the middleware to the broker
`session`       the connections of one event loop
`publisher`     sends the envelopes of concurrent callers together
`waiters`       callers that wait for outcomes, over one subscription
`cancel`        revokes a task
`outbox`        tasks that are stored in PostgreSQL with the rows of their sender
`dead_letters`  lists dead letters, sends them back, drops them
==============  ===================================================================
"""
