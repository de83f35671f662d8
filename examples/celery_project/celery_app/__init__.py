"""A project as Celery users lay it out; the application is `app`."""

from aiotaskq import TaskQueue

app = TaskQueue("celery_app")
app.config_from_object("celery_app.config")
