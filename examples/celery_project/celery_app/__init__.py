"""A project with the layout of a Celery project; the application is `app`."""

from aiotaskq import TaskQueue

app = TaskQueue("celery_app")
app.config_from_object("celery_app.config")
