"""The processes of a worker: the supervisor, and the process that keeps the leases."""
