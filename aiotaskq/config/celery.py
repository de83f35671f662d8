"""What Celery's settings mean here: its old names, and those that have no counterpart.

A setting of Celery that asks for what this project does anyway is accepted, and reads as that. One
that asks for anything else is refused with the reason, since a setting that is silently ignored is
found out in production. Those that exist here under the same name are in `settings`, not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from aiotaskq.errors import ConfigError


class Foreign(NamedTuple):
    """A setting of Celery that does not exist here.

    Attributes:
        reason: Why any other value is refused, and what to use instead.
        fine: The values that ask for what is so anyway; the first is what it reads as.
    """

    reason: str
    fine: tuple[object, ...] = ()

    def check(self, label: str, value: object) -> object:
        """Return `value` if it asks for what is so anyway.

        Raises:
            ConfigError: It asks for something else.
        """
        for known in self.fine:
            # True equals 1, and asks for something else.
            if isinstance(value, bool) is isinstance(known, bool) and value == known:
                return known
        # Text may be a password.
        shown = f" = {value!r}" if value is None or isinstance(value, int | float) else ""
        hint = f" ({self.fine[0]!r} is accepted)" if self.fine else ""
        raise ConfigError(f"{label}{shown} is not supported{hint}: {self.reason}")


_URL = "it is part of broker_url"
_BACKEND_URL = "it is part of result_backend, which is a URL"
_TLS = "use a URL of rediss://"
_DRIVER = "the drivers look after their connections by themselves"
_DEADLINE = "what becomes of a late run is its schedule's own: misfire= and grace= of Schedule"
_SCHEDULER = "schedules rest in the broker's store, and any number of schedulers look there"
_EVENTS = "there are no event queues in this version"
_CONTROL = "there is no remote control in this version"
_SIGNING = "messages are not signed in this version"
_SERVICE = "a service manager such as systemd does this"
_EXCHANGE = "tasks are sent to queues by name; use task_default_queue or task_routes"
_MISSING_QUEUES = "a queue exists as soon as its name is used"
_RETRY_POLICY = "senders try again, with growing pauses, for broker_publish_timeout seconds"
_RESULT_RETRY = "a result that cannot be stored is tried again, with growing pauses"
_SETTLED = "a task that failed is settled with its failure stored; to run it again give it a retry"
_LOST = "what a dead worker held runs again, until max_crashes workers died of it"
_PREFETCH = "a worker takes what it can start, and no more"
_NO_CHORDS = "there are no chords in this version"
_TABLES = "its tables are made by the driver, and named after the setting prefix"
_POOL = (
    'coroutines run on the event loop; a plain function says executor="thread" or '
    'executor="process" in its decorator'
)
_EAGER = "tasks are never run in the sender"
_STORE = "there is no such result backend"

_FOREIGN: dict[str, Foreign] = {
    # delivery
    "task_acks_late": Foreign(
        "delivery is at least once, always: a task is settled after it ran", (True,)
    ),
    "task_acks_on_failure_or_timeout": Foreign(_SETTLED, (True,)),
    "task_acks_on_failure": Foreign(_SETTLED, (True, None)),
    "task_acks_on_timeout": Foreign(_SETTLED, (True, None)),
    "task_reject_on_worker_lost": Foreign(_LOST, (True,)),
    "task_retry_on_worker_lost": Foreign(_LOST, (True,)),
    "worker_deduplicate_successful_tasks": Foreign(
        "a task may run again after a crash; the first outcome that was stored stays", (False,)
    ),
    "worker_cancel_long_running_tasks_on_connection_loss": Foreign(
        "a task goes on while its worker holds its lease, connection or not", (False,)
    ),
    "worker_prefetch_multiplier": Foreign(_PREFETCH, (1,)),
    "worker_disable_prefetch": Foreign(_PREFETCH, (True,)),
    "worker_enable_prefetch_count_reduction": Foreign(_PREFETCH, (True,)),
    "worker_eta_task_limit": Foreign(
        "delayed tasks wait in the store, not in a worker's memory", (None,)
    ),
    "worker_lost_wait": Foreign("use worker_lease"),
    "worker_proc_alive_timeout": Foreign("use worker_lease"),
    "worker_soft_shutdown_timeout": Foreign("use worker_grace_period"),
    "worker_enable_soft_shutdown_on_idle": Foreign(
        "a worker without running tasks stops at once", (False,)
    ),
    # sending
    "task_annotations": Foreign("give the options to @app.task", (None,)),
    "task_args_repr_function": Foreign("arguments are not sent as text"),
    "task_kwargs_repr_function": Foreign("arguments are not sent as text"),
    "task_compression": Foreign("messages are not compressed", (None,)),
    "task_create_missing_queues": Foreign(_MISSING_QUEUES, (True,)),
    "task_create_missing_queue_type": Foreign(_MISSING_QUEUES),
    "task_create_missing_queue_exchange_type": Foreign(_MISSING_QUEUES, (None,)),
    "task_default_delivery_mode": Foreign("messages are kept durably", (2, "persistent")),
    "task_default_exchange": Foreign(_EXCHANGE, (None,)),
    "task_default_exchange_type": Foreign(_EXCHANGE, ("direct",)),
    "task_default_queue_type": Foreign("the driver chooses the type of its queues"),
    "task_default_rate_limit": Foreign("there are no rate limits in this version", (None,)),
    "task_default_routing_key": Foreign(_EXCHANGE, (None,)),
    "task_eager_propagates": Foreign(_EAGER, (False,)),
    "task_store_eager_result": Foreign(_EAGER, (False,)),
    "task_inherit_parent_priority": Foreign("give the priority with the call", (False,)),
    "task_protocol": Foreign("there is one protocol", (2,)),
    "task_publish_retry": Foreign(_RETRY_POLICY, (True,)),
    "task_publish_retry_policy": Foreign(f"{_RETRY_POLICY}; use that"),
    "task_queue_max_priority": Foreign("priorities are 0 to 9, in every queue", (None, 9)),
    "task_queues": Foreign(
        "queues need no declaration; the worker's option --queues says which it serves", (None,)
    ),
    "task_remote_tracebacks": Foreign(
        "the remote traceback is text, in `remote_traceback` of the error", (False,)
    ),
    "task_store_errors_even_if_ignored": Foreign(
        "a task that keeps no result keeps no failure", (False,)
    ),
    "task_allow_error_cb_on_chord_header": Foreign(_NO_CHORDS, (False,)),
    # brokers
    "broker_connection_retry": Foreign("a worker connects again, always", (True,)),
    "broker_connection_max_retries": Foreign("a worker tries to connect again for ever", (None, 0)),
    "broker_channel_error_retry": Foreign("a worker connects again, always", (True,)),
    "broker_connection_timeout": Foreign(f"{_DRIVER}; for senders use broker_publish_timeout"),
    "broker_failover_strategy": Foreign("name one address", (None,)),
    "broker_heartbeat": Foreign(f"{_DRIVER}; a worker's sign of life is worker_heartbeat"),
    "broker_heartbeat_checkrate": Foreign(f"{_DRIVER}; see worker_heartbeat and worker_lease"),
    "broker_login_method": Foreign(_DRIVER, (None,)),
    "broker_native_delayed_delivery_queue_type": Foreign("the driver chooses its queues' types"),
    "broker_pool_limit": Foreign(_DRIVER),
    "broker_pool_acquire_timeout": Foreign(_DRIVER, (None,)),
    "broker_read_url": Foreign("there is one address for both: broker_url", (None,)),
    "broker_write_url": Foreign("there is one address for both: broker_url", (None,)),
    "broker_transport": Foreign("the scheme of broker_url says it", (None,)),
    "broker_use_ssl": Foreign(_TLS, (False, None)),
    # results
    "result_accept_content": Foreign("results are read in whatever accept_content names", (None,)),
    "result_backend_always_retry": Foreign(_RESULT_RETRY, (True,)),
    "result_backend_base_sleep_between_retries_ms": Foreign(_RESULT_RETRY),
    "result_backend_max_retries": Foreign(_RESULT_RETRY),
    "result_backend_max_sleep_between_retries_ms": Foreign(_RESULT_RETRY),
    "result_backend_thread_safe": Foreign("each event loop has its own connection", (False,)),
    "result_cache_max": Foreign("results are not cached in the caller", (-1,)),
    "result_chord_join_timeout": Foreign(_NO_CHORDS),
    "result_chord_retry_interval": Foreign(_NO_CHORDS),
    "result_compression": Foreign("results are not compressed", (None,)),
    "result_exchange": Foreign("the names begin with the setting prefix"),
    "result_exchange_type": Foreign("the driver chooses the type"),
    "result_persistent": Foreign("how long results live is up to result_expires", (None,)),
    "override_backends": Foreign("give a driver object to TaskQueue(backend=...)", (None, {})),
    "database_url": Foreign("use result_backend", (None,)),
    "database_create_tables_at_setup": Foreign(_TABLES, (True,)),
    "database_engine_callback": Foreign(_DRIVER, (None,)),
    "database_engine_options": Foreign(_DRIVER),
    "database_short_lived_sessions": Foreign(_DRIVER, (False,)),
    "database_table_names": Foreign(_TABLES, (None, {})),
    "database_table_schemas": Foreign(_TABLES, (None, {})),
    "redis_backend_credential_provider": Foreign(_BACKEND_URL, (None,)),
    "redis_backend_health_check_interval": Foreign(_DRIVER, (None,)),
    "redis_backend_use_ssl": Foreign(_TLS, (False, None)),
    "redis_client_name": Foreign(_DRIVER, (None,)),
    "redis_max_connections": Foreign(_DRIVER, (None,)),
    "redis_retry_on_timeout": Foreign(_DRIVER),
    "redis_socket_connect_timeout": Foreign(_DRIVER, (None,)),
    "redis_socket_keepalive": Foreign(_DRIVER),
    "redis_socket_timeout": Foreign(_DRIVER),
    # workers
    "worker_agent": Foreign("there are no agents", (None,)),
    "worker_autoscaler": Foreign("worker_concurrency is a fixed number"),
    "worker_consumer": Foreign("the worker's parts cannot be exchanged"),
    "worker_detect_quorum_queues": Foreign("the driver chooses the type of its queues"),
    "worker_direct": Foreign("workers have no queues of their own", (False,)),
    "worker_disable_rate_limits": Foreign("there are no rate limits in this version", (True,)),
    "worker_enable_remote_control": Foreign(_CONTROL, (False,)),
    "worker_log_color": Foreign("log lines are not coloured", (False, None)),
    "worker_pool": Foreign(_POOL),
    "worker_pool_putlocks": Foreign(_POOL),
    "worker_pool_restarts": Foreign(_POOL, (False,)),
    "worker_redirect_stdouts": Foreign("what tasks print goes where it went", (False,)),
    "worker_redirect_stdouts_level": Foreign("what tasks print goes where it went"),
    "worker_state_db": Foreign("cancelled tasks are remembered by the broker", (None,)),
    "worker_task_log_format": Foreign(
        "worker_log_format holds for all lines; a task knows its id by current_task()"
    ),
    "worker_timer": Foreign("the event loop is the timer", (None,)),
    "worker_timer_precision": Foreign("the event loop is the timer"),
}


def _group(reason: str, start: str, ends: str, *fine: object) -> Iterable[tuple[str, Foreign]]:
    line = Foreign(reason, fine)
    return ((f"{start}_{end}", line) for end in ends.split())


for _lines in (
    _group(_URL, "broker", "host port user password vhost", None),
    _group(_BACKEND_URL, "redis", "db host port username password", None),
    _group(_SIGNING, "security", "certificate cert_store key key_password", None),
    _group(_SIGNING, "security", "digest"),
    _group(_SCHEDULER, "beat", "max_loop_interval schedule_filename scheduler sync_every"),
    _group(_DEADLINE, "beat", "cron_starting_deadline", None),
    _group(_EVENTS, "event", "exchange queue_durable queue_exclusive queue_expires"),
    _group(_EVENTS, "event", "queue_prefix queue_ttl serializer"),
    _group(_CONTROL, "control", "exchange queue_durable queue_exclusive queue_expires queue_ttl"),
    _group(_SERVICE, "worker", "executable gid logfile pidfile uid umask", None),
    _group(_SERVICE, "beat", "executable gid logfile pidfile uid umask", None),
    _group(_SERVICE, "events", "executable gid logfile pidfile uid umask", None),
    _group(_STORE, "arangodb", "backend_settings", None),
    _group(_STORE, "azureblockblob", "base_path connection_timeout container_name read_timeout"),
    _group(
        _STORE,
        "azureblockblob",
        "retry_increment_base retry_initial_backoff_sec retry_max_attempts",
    ),
    _group(_STORE, "cache", "backend backend_options", None),
    _group(_STORE, "cassandra", "auth_kwargs auth_provider bundle_path entry_ttl keyspace"),
    _group(_STORE, "cassandra", "options port read_consistency secure_bundle_path servers"),
    _group(_STORE, "cassandra", "table write_consistency"),
    _group(_STORE, "cosmosdbsql", "collection_name consistency_level database_name"),
    _group(_STORE, "cosmosdbsql", "max_retry_attempts max_retry_wait_time"),
    _group(_STORE, "couchbase", "backend_settings", None),
    _group(_STORE, "elasticsearch", "max_retries retry_on_timeout save_meta_as_text timeout"),
    _group(_STORE, "gcs", "base_path bucket project ttl"),
    _group(_STORE, "mongodb", "backend_settings", None),
    _group(_STORE, "s3", "access_key_id base_path bucket endpoint_url region secret_access_key"),
):
    _FOREIGN.update(_lines)

FOREIGN: Mapping[str, Foreign] = _FOREIGN
"""Celery's settings that do not exist here, by their lower-case names."""

# Old names that do not follow the rule of `_old_name`, as its code or its manual has them.
_IRREGULAR = {
    "CELERYD_LOG_FORMAT": "worker_log_format",
    "CELERYD_REDIRECT_STDOUTS": "worker_redirect_stdouts",
    "CELERYD_REDIRECT_STDOUTS_LEVEL": "worker_redirect_stdouts_level",
    "CELERYD_SOFT_TIME_LIMIT": "task_soft_time_limit",
    "CELERYD_TASK_LOG_FORMAT": "worker_task_log_format",
    "CELERYD_TASK_SOFT_TIME_LIMIT": "task_soft_time_limit",
    "CELERYD_TASK_TIME_LIMIT": "task_time_limit",
    "CELERYD_TIME_LIMIT": "task_time_limit",
    "CELERYD_WORKER_LOST_WAIT": "worker_lost_wait",
    "CELERY_ALWAYS_EAGER": "task_always_eager",
    "CELERY_AMQP_TASK_RESULT_EXPIRES": "result_expires",
    "CELERY_COMPRESSION": "task_compression",
    "CELERY_DISABLE_RATE_LIMITS": "worker_disable_rate_limits",
    "CELERY_EAGER_PROPAGATES": "task_eager_propagates",
    "CELERY_EAGER_PROPAGATES_EXCEPTIONS": "task_eager_propagates",
    "CELERY_ENABLE_REMOTE_CONTROL": "worker_enable_remote_control",
    "CELERY_MAX_CACHED_RESULTS": "result_cache_max",
    "CELERY_MESSAGE_COMPRESSION": "task_compression",
    "CELERY_PUBLISH_RETRY": "task_publish_retry",
    "CELERY_PUBLISH_RETRY_POLICY": "task_publish_retry_policy",
    "CELERY_REDIRECT_STDOUTS": "worker_redirect_stdouts",
    "CELERY_REDIRECT_STDOUTS_LEVEL": "worker_redirect_stdouts_level",
    "CELERY_REJECT_ON_WORKER_LOST": "task_reject_on_worker_lost",
    "CELERY_RESULT_DBURI": "database_url",
    "CELERY_RESULT_DB_SHORT_LIVED_SESSIONS": "database_short_lived_sessions",
    "CELERY_RESULT_DB_TABLENAMES": "database_table_names",
    "CELERY_RESULT_DB_TABLE_NAMES": "database_table_names",
    "CELERY_RESULT_ENGINE_OPTIONS": "database_engine_options",
    "CELERY_RESULT_EXPIRES": "result_expires",
    "CELERY_SEND_EVENTS": "worker_send_task_events",
    "CELERY_SEND_SENT_EVENT": "task_send_sent_event",
    "CELERY_SEND_TASK_SENT_EVENT": "task_send_sent_event",
    "CELERY_TASK_ALWAYS_EAGER": "task_always_eager",
    "CELERY_TASK_PROTOCOL": "task_protocol",
    "CELERY_TASK_PUBLISH_RETRY": "task_publish_retry",
    "CELERY_TASK_PUBLISH_RETRY_POLICY": "task_publish_retry_policy",
    "CELERY_TASK_REJECT_ON_WORKER_LOST": "task_reject_on_worker_lost",
    "CELERY_TASK_RESULT_EXPIRES": "result_expires",
    "CELERY_TASK_SERIALIZER": "task_serializer",
    "CELERY_TASK_TRACK_STARTED": "task_track_started",
    "CELERY_TRACK_STARTED": "task_track_started",
    "CELERY_WORKER_DIRECT": "worker_direct",
    "CELERY_WORKER_LOG_FORMAT": "worker_log_format",
    "CELERY_WORKER_TASK_LOG_FORMAT": "worker_task_log_format",
}

# What begins so is a setting or the misspelling of one, wherever it stands.
OLD_STARTS = ("CELERY_", "CELERYD_", "CELERYBEAT_", "BROKER_")

_NEW_STARTS = {"beat": "CELERYBEAT", "worker": "CELERYD", "task": "CELERY", "broker": "BROKER"}


def _old_name(name: str) -> str:
    group, _, rest = name.partition("_")
    if group in _NEW_STARTS:
        return f"{_NEW_STARTS[group]}_{rest.upper()}"
    return f"CELERY_{name.upper()}"


def old_names(names: Iterable[str]) -> Mapping[str, str]:
    """Return Celery's upper-case names for `names` and for what is in `FOREIGN`.

    Args:
        names: The settings that exist here and in Celery.

    Returns:
        The lower-case name by the upper-case one. A setting can have several.
    """
    irregular = set(_IRREGULAR.values())
    regular = {_old_name(name): name for name in (*names, *FOREIGN) if name not in irregular}
    return {**regular, **_IRREGULAR}
