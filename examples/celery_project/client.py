"""Sends two tasks and ends. A worker runs them, on any machine."""

from celery_app import task1, task2

print(task1.add.delay(2, 8).id)
print(task2.multiply.apply_async(args=(3, 7), countdown=1).id)
