"""Celery's options of a task, in the words of this package.

Two of them are called otherwise here (`time_limit`, `soft_time_limit`); two may only ask for what
is so anyway (`acks_late`, `reject_on_worker_lost`); and eight describe a `Retry`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aiotaskq.errors import ConfigError
from aiotaskq.retry import Retry
from aiotaskq.tasks.option_table import CELERY_DELAY, CELERY_NAMES, CELERY_RETRIES, OPTIONS

_OF_RETRIES = frozenset(name for name, option in OPTIONS.items() if option.part_of == "retry")
_ALREADY_SO = frozenset({"acks_late", "reject_on_worker_lost"})


def translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a task by the names that they have here, checked one by one.

    Args:
        given: Options that exist, by our names or Celery's. One that is None is not given, but for
            `max_retries`, where None is a value.

    Raises:
        ConfigError: A value is wrong, or an option is given twice.
    """
    options: dict[str, Any] = {}
    retries: dict[str, Any] = {}
    for spelled, value in given.items():
        name = CELERY_NAMES.get(spelled, spelled)
        if value is None and name != "max_retries":
            continue
        if name in options:
            raise ConfigError(f"{name} is given twice, also by Celery's name of it: give one")
        checked = None if value is None else OPTIONS[name].check(value)
        if name in _OF_RETRIES:
            retries[name] = checked
        elif name not in _ALREADY_SO:
            options[name] = checked
    if retries:
        if "retry" in options:
            raise ConfigError(
                f"retry and Celery's options of retries ({', '.join(sorted(retries))}) say the"
                " same: give one"
            )
        options["retry"] = _retry(retries)
        options["default_retry_delay"] = retries.get("default_retry_delay", CELERY_DELAY)
    return options


def _retry(given: Mapping[str, Any]) -> Retry:
    """Return the `Retry` that Celery's options describe.

    Without `autoretry_for` it is one that no exception asks for by itself, and ``self.retry()``
    finds its numbers there.
    """
    extra = given.get("retry_kwargs", {})
    retries = extra.get("max_retries", given.get("max_retries", CELERY_RETRIES))
    backoff = given.get("retry_backoff", 0.0)
    growth: dict[str, Any]
    if backoff:
        growth = {
            "delay": max(1.0, backoff),  # Celery takes less for 1 as well
            "backoff": "exponential",
            "max_delay": given.get("retry_backoff_max", 600.0),
            "jitter": "full" if given.get("retry_jitter", True) else False,
        }
    else:  # in Celery only growing delays are bounded, and random
        delay = float(extra.get("countdown", given.get("default_retry_delay", CELERY_DELAY)))
        growth = {"delay": delay, "backoff": "constant", "max_delay": delay, "jitter": False}
    return Retry(
        max_attempts=math.inf if retries is None else retries + 1,
        on=given.get("autoretry_for", ()),
        never_on=given.get("dont_autoretry_for", ()),
        **growth,
    )
