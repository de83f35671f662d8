"""Settings with Celery's old upper-case names."""

import os
from datetime import timedelta

REDIS = os.environ.get("REDIS_URL", "redis://localhost:6379")

BROKER_URL = f"{REDIS}/0"
CELERY_RESULT_BACKEND = f"{REDIS}/1"
CELERY_TIMEZONE = "Europe/Oslo"
CELERY_IMPORTS = ("celery_app.task1", "celery_app.task2")

CELERYBEAT_SCHEDULE = {
    "add-every-30-seconds": {
        "task": "celery_app.task1.add",
        "schedule": timedelta(seconds=30),
        "args": (5, 8),
    },
}
