"""Cancelling: a message that is never handed out again, and an outcome that says REVOKED."""

from __future__ import annotations

from datetime import UTC, datetime

from aiotaskq.client.session import Session
from aiotaskq.contract.outcome import Outcome, TaskStatus
from aiotaskq.encoding.exceptions import encode_error


async def cancel_task(session: Session, task_id: str, *, running: bool, ttl: float | None) -> None:
    """Revoke a task.

    Args:
        session: Where it was sent.
        task_id: Its id; one that is not known yet is revoked as well.
        running: Whether a task that runs is cancelled. If not, it is left alone.
        ttl: Seconds for which the outcome is kept.
    """
    if running:
        # The outcome first: if the second step fails, the callers that wait have been told, and the
        # task's own outcome will be refused. The other way round there would be neither.
        await store_revoked(session, task_id, ttl)
        await session.broker.cancel([task_id])
    # Here only the broker knows whether it runs, and so whether that is its outcome: stored
    # first, it would stand against the value of a running task. If the second step fails, the
    # caller hears of it, and may do it all again.
    elif task_id not in await session.broker.cancel([task_id], running=False):
        await store_revoked(session, task_id, ttl)


async def store_revoked(session: Session, task_id: str, ttl: float | None) -> None:
    """Store the outcome of a cancelled task, unless it has another one, or none are kept."""
    if session.keeps_results:
        revoked = Outcome(
            task_id=task_id,
            status=TaskStatus.REVOKED,
            result=encode_error("TaskRevoked", "cancelled"),
            date_done=datetime.now(UTC),
        )
        await (await session.results()).store([revoked], ttl)
