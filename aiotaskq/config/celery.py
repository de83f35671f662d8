"""Celery's settings that do not exist in aiotaskq, and Celery's old upper-case names.

A setting of Celery is accepted if its value asks for the behaviour that aiotaskq always has. Any
other value is refused with the reason: a setting that is silently ignored is noticed only in
production. Settings that exist in both, under the same name, are in `settings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from aiotaskq.errors import ConfigError


class CeleryOnly(NamedTuple):
    """A setting of Celery that does not exist in aiotaskq.

    Attributes:
        reason: Why any other value is refused, and what to use instead.
        accepted: The values that ask for what aiotaskq does anyway. The first is what reading the
            setting returns.
    """

    reason: str
    accepted: tuple[object, ...] = ()

    def check(self, label: str, value: object) -> object:
        """Return `value` if it asks for the behaviour that aiotaskq has anyway.

        Raises:
            ConfigError: It asks for something else.
        """
        for known in self.accepted:
            # True equals 1, and means something else.
            if isinstance(value, bool) is isinstance(known, bool) and value == known:
                return known
        # A text may be a password.
        shown = f" = {value!r}" if value is None or isinstance(value, int | float) else ""
        hint = f" ({self.accepted[0]!r} is accepted)" if self.accepted else ""
        raise ConfigError(f"{label}{shown} is not supported{hint}: {self.reason}")


_URL = "give it as a part of broker_url"
_BACKEND_URL = "give it as a part of result_backend, which is a URL"
_TLS = "use a URL with TLS, such as rediss:// or amqps://"
_DRIVER = "the drivers manage their connections themselves"
_DEADLINE = "late runs are configured for each schedule: misfire= and grace= of Schedule"
_SCHEDULER = (
    "schedules are stored in the broker's store, and any number of schedulers read them there"
)
_EVENTS = "there are no event queues in this version"
_CONTROL = "there is no remote control in this version"
_SIGNING = "messages are not signed in this version"
_SERVICE = "use a service manager such as systemd for this"
_EXCHANGE = "tasks are sent to queues by name; use task_default_queue or task_routes"
_MISSING_QUEUES = "a queue exists as soon as its name is used"
_RETRY_POLICY = "senders retry with growing pauses for broker_publish_timeout seconds"
_RESULT_RETRY = "storing a result is retried with growing pauses"
_SETTLED = (
    "the failure of a task is stored, and its message is removed; to run it again give it a retry"
)
_LOST = "the tasks of a dead worker run again, unless max_crashes workers died while running them"
_PREFETCH = "a worker takes only what it can start at once"
_NO_CHORDS = "there are no chords in this version"
_TABLES = "the driver creates its tables, and their names begin with the setting prefix"
_POOL = (
    'coroutines run on the event loop; for a plain function give executor="thread" or '
    'executor="process" in its decorator, or set task_default_executor for all'
)
_EAGER = "sending a task never runs it in the caller"
_STORE = "there is no such result backend"

_CELERY_ONLY: dict[str, CeleryOnly] = {
    # delivery
    "task_acks_late": CeleryOnly(
        "delivery is always at least once: a message is removed after its task ran", (True,)
    ),
    "task_acks_on_failure_or_timeout": CeleryOnly(_SETTLED, (True,)),
    "task_acks_on_failure": CeleryOnly(_SETTLED, (True, None)),
    "task_acks_on_timeout": CeleryOnly(_SETTLED, (True, None)),
    "task_reject_on_worker_lost": CeleryOnly(_LOST, (True,)),
    "task_retry_on_worker_lost": CeleryOnly(_LOST, (True,)),
    "worker_deduplicate_successful_tasks": CeleryOnly(
        "a task may run again after a crash; the first outcome that is stored stays", (False,)
    ),
    "worker_cancel_long_running_tasks_on_connection_loss": CeleryOnly(
        "a task goes on as long as its worker has its lease, with or without a connection", (False,)
    ),
    "worker_prefetch_multiplier": CeleryOnly(_PREFETCH, (1,)),
    "worker_disable_prefetch": CeleryOnly(_PREFETCH, (True,)),
    "worker_enable_prefetch_count_reduction": CeleryOnly(_PREFETCH, (True,)),
    "worker_eta_task_limit": CeleryOnly(
        "delayed tasks wait in the store, not in a worker's memory", (None,)
    ),
    "worker_lost_wait": CeleryOnly("use worker_lease"),
    "worker_proc_alive_timeout": CeleryOnly("use worker_lease"),
    "worker_soft_shutdown_timeout": CeleryOnly("use worker_grace_period"),
    "worker_enable_soft_shutdown_on_idle": CeleryOnly(
        "a worker without running tasks stops at once", (False,)
    ),
    # sending
    "task_annotations": CeleryOnly("give the options to @app.task", (None,)),
    "task_args_repr_function": CeleryOnly("arguments are not sent as text"),
    "task_kwargs_repr_function": CeleryOnly("arguments are not sent as text"),
    "task_compression": CeleryOnly("messages are not compressed", (None,)),
    "task_create_missing_queues": CeleryOnly(_MISSING_QUEUES, (True,)),
    "task_create_missing_queue_type": CeleryOnly(_MISSING_QUEUES),
    "task_create_missing_queue_exchange_type": CeleryOnly(_MISSING_QUEUES, (None,)),
    "task_default_delivery_mode": CeleryOnly(
        "messages are always stored durably", (2, "persistent")
    ),
    "task_default_exchange": CeleryOnly(_EXCHANGE, (None,)),
    "task_default_exchange_type": CeleryOnly(_EXCHANGE, ("direct",)),
    "task_default_queue_type": CeleryOnly("the driver chooses the type of its queues"),
    "task_default_rate_limit": CeleryOnly("there are no rate limits in this version", (None,)),
    "task_default_routing_key": CeleryOnly(_EXCHANGE, (None,)),
    "task_eager_propagates": CeleryOnly(_EAGER, (False,)),
    "task_store_eager_result": CeleryOnly(_EAGER, (False,)),
    "task_inherit_parent_priority": CeleryOnly("give the priority with the call", (False,)),
    "task_protocol": CeleryOnly("there is only one protocol", (2,)),
    "task_publish_retry": CeleryOnly(_RETRY_POLICY, (True,)),
    "task_publish_retry_policy": CeleryOnly(f"{_RETRY_POLICY}; use that"),
    "task_queue_max_priority": CeleryOnly("priorities are 0 to 9 in every queue", (None, 9)),
    "task_queues": CeleryOnly(
        "queues need no declaration; the worker's option --queues names the queues it serves",
        (None,),
    ),
    "task_remote_tracebacks": CeleryOnly(
        "the remote traceback is a text, the attribute `remote_traceback` of the error", (False,)
    ),
    "task_store_errors_even_if_ignored": CeleryOnly(
        "a task with ignore_result stores no failure either", (False,)
    ),
    "task_allow_error_cb_on_chord_header": CeleryOnly(_NO_CHORDS, (False,)),
    # brokers
    "broker_connection_retry": CeleryOnly("a worker always connects again", (True,)),
    "broker_connection_max_retries": CeleryOnly(
        "a worker never stops trying to connect again", (None, 0)
    ),
    "broker_channel_error_retry": CeleryOnly("a worker always connects again", (True,)),
    "broker_connection_timeout": CeleryOnly(f"{_DRIVER}; for senders use broker_publish_timeout"),
    "broker_failover_strategy": CeleryOnly("give one address", (None,)),
    "broker_heartbeat": CeleryOnly(f"{_DRIVER}; for the worker's heartbeat use worker_heartbeat"),
    "broker_heartbeat_checkrate": CeleryOnly(f"{_DRIVER}; see worker_heartbeat and worker_lease"),
    "broker_login_method": CeleryOnly(_DRIVER, (None,)),
    "broker_native_delayed_delivery_queue_type": CeleryOnly(
        "the driver chooses the types of its queues"
    ),
    "broker_pool_limit": CeleryOnly(_DRIVER),
    "broker_pool_acquire_timeout": CeleryOnly(_DRIVER, (None,)),
    "broker_read_url": CeleryOnly("there is one URL for both: broker_url", (None,)),
    "broker_write_url": CeleryOnly("there is one URL for both: broker_url", (None,)),
    "broker_transport": CeleryOnly("the scheme of broker_url chooses it", (None,)),
    "broker_use_ssl": CeleryOnly(_TLS, (False, None)),
    # results
    "result_accept_content": CeleryOnly("accept_content holds for results as well", (None,)),
    "result_backend_always_retry": CeleryOnly(_RESULT_RETRY, (True,)),
    "result_backend_base_sleep_between_retries_ms": CeleryOnly(_RESULT_RETRY),
    "result_backend_max_retries": CeleryOnly(_RESULT_RETRY),
    "result_backend_max_sleep_between_retries_ms": CeleryOnly(_RESULT_RETRY),
    "result_backend_thread_safe": CeleryOnly("each event loop has its own connection", (False,)),
    "result_cache_max": CeleryOnly("results are not cached in the caller", (-1,)),
    "result_chord_join_timeout": CeleryOnly(_NO_CHORDS),
    "result_chord_retry_interval": CeleryOnly(_NO_CHORDS),
    "result_compression": CeleryOnly("results are not compressed", (None,)),
    "result_exchange": CeleryOnly("the names begin with the setting prefix"),
    "result_exchange_type": CeleryOnly("the driver chooses the type"),
    "result_persistent": CeleryOnly("use result_expires for how long results are kept", (None,)),
    "override_backends": CeleryOnly("give a driver object to TaskQueue(backend=...)", (None, {})),
    "database_url": CeleryOnly("use result_backend", (None,)),
    "database_create_tables_at_setup": CeleryOnly(_TABLES, (True,)),
    "database_engine_callback": CeleryOnly(_DRIVER, (None,)),
    "database_engine_options": CeleryOnly(_DRIVER),
    "database_short_lived_sessions": CeleryOnly(_DRIVER, (False,)),
    "database_table_names": CeleryOnly(_TABLES, (None, {})),
    "database_table_schemas": CeleryOnly(_TABLES, (None, {})),
    "redis_backend_credential_provider": CeleryOnly(_BACKEND_URL, (None,)),
    "redis_backend_health_check_interval": CeleryOnly(_DRIVER, (None,)),
    "redis_backend_use_ssl": CeleryOnly(_TLS, (False, None)),
    "redis_client_name": CeleryOnly(_DRIVER, (None,)),
    "redis_max_connections": CeleryOnly(_DRIVER, (None,)),
    "redis_retry_on_timeout": CeleryOnly(_DRIVER),
    "redis_socket_connect_timeout": CeleryOnly(_DRIVER, (None,)),
    "redis_socket_keepalive": CeleryOnly(_DRIVER),
    "redis_socket_timeout": CeleryOnly(_DRIVER),
    # workers
    "worker_agent": CeleryOnly("workers have no agents", (None,)),
    "worker_autoscaler": CeleryOnly("worker_concurrency is a fixed number"),
    "worker_consumer": CeleryOnly("the parts of a worker cannot be replaced"),
    "worker_detect_quorum_queues": CeleryOnly("the driver chooses the type of its queues"),
    "worker_direct": CeleryOnly("workers have no queues of their own", (False,)),
    "worker_disable_rate_limits": CeleryOnly("there are no rate limits in this version", (True,)),
    "worker_enable_remote_control": CeleryOnly(_CONTROL, (False,)),
    "worker_log_color": CeleryOnly("log lines have no colours", (False, None)),
    "worker_pool": CeleryOnly(_POOL),
    "worker_pool_putlocks": CeleryOnly(_POOL),
    "worker_pool_restarts": CeleryOnly(_POOL, (False,)),
    "worker_redirect_stdouts": CeleryOnly("the output of tasks is not redirected", (False,)),
    "worker_redirect_stdouts_level": CeleryOnly("the output of tasks is not redirected"),
    "worker_state_db": CeleryOnly("the broker stores which tasks are cancelled", (None,)),
    "worker_task_log_format": CeleryOnly(
        "use worker_log_format, which formats all lines; current_task().id is the id of a task"
    ),
    "worker_timer": CeleryOnly("the event loop is the timer", (None,)),
    "worker_timer_precision": CeleryOnly("the event loop is the timer"),
}


def _group(
    reason: str, start: str, ends: str, *accepted: object
) -> Iterable[tuple[str, CeleryOnly]]:
    line = CeleryOnly(reason, accepted)
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
    _CELERY_ONLY.update(_lines)

CELERY_ONLY: Mapping[str, CeleryOnly] = _CELERY_ONLY
"""Celery's settings that do not exist in aiotaskq, by their lower-case names."""

# Old names that do not follow the rule of `_old_name`; from Celery's code and manual.
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

# A name that begins so is a setting, or a misspelled one, in any source.
OLD_STARTS = ("CELERY_", "CELERYD_", "CELERYBEAT_", "BROKER_")

_NEW_STARTS = {"beat": "CELERYBEAT", "worker": "CELERYD", "task": "CELERY", "broker": "BROKER"}


def _old_name(name: str) -> str:
    group, _, rest = name.partition("_")
    if group in _NEW_STARTS:
        return f"{_NEW_STARTS[group]}_{rest.upper()}"
    return f"CELERY_{name.upper()}"


def old_names(names: Iterable[str]) -> Mapping[str, str]:
    """Return Celery's upper-case names for `names` and for the settings in `CELERY_ONLY`.

    Args:
        names: The settings that exist both in aiotaskq and in Celery.

    Returns:
        The lower-case names by the upper-case names. A setting can have several of these.
    """
    irregular = set(_IRREGULAR.values())
    regular = {_old_name(name): name for name in (*names, *CELERY_ONLY) if name not in irregular}
    return {**regular, **_IRREGULAR}
