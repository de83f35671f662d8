"""Settings under Celery's old upper-case names."""

import os

REDIS = os.environ.get("REDIS_URL", "redis://localhost:6379")

BROKER_URL = f"{REDIS}/0"
CELERY_RESULT_BACKEND = f"{REDIS}/1"
CELERY_TIMEZONE = "Europe/Oslo"
CELERY_IMPORTS = ("celery_app.task1", "celery_app.task2")
