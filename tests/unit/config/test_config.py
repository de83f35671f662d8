"""`Config`: its table of settings, their values, and their names."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, assert_type

import pytest

from aiotaskq.config import Config, Serializer, UnknownSetting
from aiotaskq.config.celery import CELERY_ONLY
from aiotaskq.config.names import NAMES
from aiotaskq.config.settings import REFUSED_DRIVER_OPTIONS, SETTINGS
from aiotaskq.errors import ConfigError
from aiotaskq.retry import Retry


@pytest.fixture
def conf() -> Config:
    return Config({})


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_every_default_is_a_value_that_the_setting_takes(name: str) -> None:
    setting = SETTINGS[name]
    assert setting.check(setting.default) == setting.default
    assert getattr(Config({}), name) == setting.default
    assert setting.meaning.endswith(".")
    assert setting.wants


def test_the_promised_defaults(conf: Config) -> None:
    assert conf.broker_url is None
    assert conf.result_backend is None
    assert conf.prefix == "aiotaskq"
    assert (conf.task_serializer, conf.result_serializer) == ("json", "json")
    assert conf.accept_content == ("json", "msgpack")
    assert conf.result_expires == 86_400
    assert conf.task_default_queue == "default"
    assert conf.timezone == "UTC"
    assert (conf.worker_concurrency, conf.worker_processes) == (100, 1)
    assert (conf.worker_lease, conf.worker_heartbeat, conf.worker_grace_period) == (15, 3, 25)
    assert (conf.task_soft_time_limit, conf.task_time_limit, conf.task_cancel_grace) == (
        None,
        None,
        5,
    )
    assert (conf.dead_letter_max, conf.dead_letter_expires) == (10_000, 30 * 86_400)
    assert (conf.worker_loop_block_warning, conf.worker_loop_block_limit) == (1, None)
    assert conf.worker_max_stuck_tasks == 10
    assert conf.task_default_retry is None


def test_type_checkers_know_each_setting(conf: Config) -> None:
    assert_type(conf.result_expires, float | None)
    assert_type(conf.task_serializer, Serializer)
    assert_type(conf.accept_content, tuple[Serializer, ...])
    assert_type(conf.worker_concurrency, int)
    assert_type(conf.task_routes, Mapping[str, str])
    conf.result_expires = timedelta(hours=1)  # accepts other types than it returns
    assert conf.result_expires == 3600


def test_settings_and_foreign_names_do_not_overlap() -> None:
    assert not SETTINGS.keys() & CELERY_ONLY.keys()


def test_every_value_that_is_fine_is_accepted(conf: Config) -> None:
    for name, foreign in CELERY_ONLY.items():
        for value in foreign.accepted:
            conf.update({name: value})
    assert conf.as_dict() == Config({}).as_dict()


# --- values -------------------------------------------------------------------------------------

ACCEPTED: list[tuple[str, Any, Any]] = [
    ("broker_url", "redis://localhost/0", "redis://localhost/0"),
    ("broker_url", None, None),
    ("result_backend", "db+postgresql+psycopg2://u:p@h/d", "db+postgresql+psycopg2://u:p@h/d"),
    ("result_backend", "disabled", "disabled://"),
    ("result_backend", "disabled://", "disabled://"),
    ("prefix", "shop-1.a_b", "shop-1.a_b"),
    ("task_serializer", "msgpack", "msgpack"),
    ("accept_content", ["json", "application/json", "pickle"], ("json", "pickle")),
    ("accept_content", ("application/x-python-serialize",), ("pickle",)),
    ("accept_content", {"msgpack", "json"}, ("json", "msgpack")),
    ("result_expires", 60, 60.0),
    ("result_expires", timedelta(days=2), 172_800.0),
    ("result_expires", 0, None),
    ("result_expires", timedelta(0), None),
    ("result_expires", None, None),
    ("task_default_priority", None, 0),
    ("task_default_priority", 9, 9),
    ("task_routes", {"a.*": {"queue": "x"}, "b": "y"}, {"a.*": "x", "b": "y"}),
    ("task_routes", None, {}),
    ("task_time_limit", timedelta(minutes=1), 60.0),
    ("task_soft_time_limit", 5, 5.0),
    ("task_soft_time_limit", None, None),
    ("task_cancel_grace", 0, 0.0),
    ("task_default_retry", Retry(max_attempts=2), Retry(max_attempts=2)),
    ("task_default_retry", None, None),
    ("dead_letter_max", 0, 0),
    ("dead_letter_expires", timedelta(days=1), 86_400.0),
    ("dead_letter_expires", 0, None),
    ("worker_max_stuck_tasks", None, None),
    ("worker_loop_block_warning", None, None),
    ("worker_loop_block_limit", timedelta(minutes=1), 60.0),
    ("imports", "one.module", ("one.module",)),
    ("imports", ["a", "b.c", "a"], ("a", "b.c")),
    ("timezone", "Europe/Oslo", "Europe/Oslo"),
    ("timezone", None, "UTC"),
    ("enable_utc", True, True),
    ("beat_schedule", {}, {}),
    ("worker_max_memory_per_child", 12_288, 12_288),
    ("worker_max_memory_per_child", "200MB", 204_800),
    ("worker_max_memory_per_child", "1.5 GiB", 1_572_864),
    ("worker_max_memory_per_child", "12288", 12_288),
    ("worker_max_memory_per_child", None, None),
    ("worker_log_format", "%(message)s", "%(message)s"),
    ("worker_grace_period", 0, 0.0),
    ("broker_transport_options", {}, {}),
    ("task_always_eager", False, False),
]


@pytest.mark.parametrize(("name", "value", "read"), ACCEPTED)
def test_a_right_value_is_read_in_its_one_form(
    conf: Config, name: str, value: Any, read: Any
) -> None:
    setattr(conf, name, value)
    assert getattr(conf, name) == conf[name] == read
    assert type(getattr(conf, name)) is type(SETTINGS[name].check(value))


REFUSED: list[tuple[str, Any, str]] = [
    ("broker_url", "localhost:6379", "URL"),
    ("broker_url", ["redis://a", "redis://b"], "URL"),
    ("broker_url", "", "URL"),
    ("result_backend", "redis", "URL"),
    ("prefix", "a b", "letters"),
    ("prefix", "", "letters"),
    ("prefix", "naïve:", "letters"),
    ("prefix", "line\n", "letters"),
    ("task_serializer", "yaml", '"json", "msgpack" or "pickle"'),
    ("task_serializer", ["json"], "json"),
    ("accept_content", "json", "list"),
    ("accept_content", [], "list"),
    ("accept_content", ["yaml"], "json"),
    ("accept_content", [["json"]], "json"),
    ("result_expires", -1, "seconds"),
    ("result_expires", True, "seconds"),
    ("result_expires", "60", "seconds"),
    ("result_expires", float("inf"), "seconds"),
    ("result_expires", float("nan"), "seconds"),
    ("result_extended", 1, "True or False"),
    ("task_default_queue", "a,b", "queue"),
    ("task_default_queue", "", "queue"),
    ("task_default_priority", 10, "0 to 9"),
    ("task_default_priority", -1, "0 to 9"),
    ("task_routes", {"a": {"queue": "x", "routing_key": "y"}}, "routing_key"),
    ("task_routes", {"a": {}}, "queue"),
    ("task_routes", {"a": 1}, "queue"),
    ("task_routes", {1: "x"}, "name or glob"),
    ("task_routes", [("a", "x")], "mapping"),
    ("task_time_limit", 0, "more than 0"),
    ("task_soft_time_limit", 0, "more than 0"),
    ("task_cancel_grace", -1, "0 or more"),
    ("task_default_retry", 3, "a Retry, set in code"),
    ("dead_letter_max", -1, "of at least 0"),
    ("dead_letter_expires", -1, "seconds"),
    ("worker_max_stuck_tasks", 0, "of at least 1"),
    ("worker_loop_block_warning", 0, "more than 0"),
    ("worker_loop_block_limit", "5", "seconds"),
    ("task_time_limit", timedelta(seconds=-1), "more than 0"),
    ("imports", ["not a module"], "not a module"),
    ("imports", ["a."], "dotted name"),
    ("imports", [3], "list of dotted"),
    ("timezone", "Mars/Olympus", "time zone"),
    ("timezone", "../etc", "time zone"),
    ("timezone", "Europe", "time zone"),
    ("timezone", 3, "time zone"),
    ("enable_utc", False, "UTC, always"),
    ("beat_schedule", {"a": {"task": "b"}}, "'a': it has no 'schedule'"),
    ("beat_schedule", ["a"], "a mapping of ids"),
    ("task_always_eager", True, "not supported in this version"),
    ("worker_send_task_events", True, "no events"),
    ("task_send_sent_event", True, "no events"),
    ("worker_concurrency", 0, "at least 1"),
    ("worker_concurrency", True, "whole number"),
    ("worker_concurrency", 1.5, "whole number"),
    ("worker_max_memory_per_child", "200 parsecs", "200MB"),
    ("worker_max_memory_per_child", "0", "200MB"),
    ("worker_max_memory_per_child", 0, "200MB"),
    ("worker_log_format", "%(asctime", "log line"),
    ("max_payload_size", 0, "bytes"),
    ("broker_transport_options", {"visibility_timeout": 3600}, "leases"),
    ("broker_transport_options", {"global_keyprefix": "x"}, "use the setting prefix"),
    ("result_backend_transport_options", {"colour": 1}, "colour"),
    ("broker_transport_options", [1], "mapping"),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED)
def test_a_wrong_value_is_refused_with_its_name_and_the_valid_values(
    conf: Config, name: str, value: Any, words: str
) -> None:
    before = conf.as_dict()
    with pytest.raises(ConfigError) as caught:
        setattr(conf, name, value)
    assert str(caught.value).startswith(name)
    assert words in str(caught.value)
    assert conf.as_dict() == before


@pytest.mark.parametrize("name", ["broker_url", "result_backend"])
def test_a_wrong_url_is_not_shown(conf: Config, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        conf[name] = "user:hunter2@host"
    assert "hunter2" not in str(caught.value)


def test_a_long_wrong_value_is_cut_short(conf: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        conf["task_serializer"] = "x" * 10_000
    assert len(str(caught.value)) < 300


def test_values_cannot_be_changed_without_the_checks(conf: Config) -> None:
    routes = {"a": "x"}
    conf.update(task_routes=routes)
    routes["a"] = "y"
    assert conf.task_routes == {"a": "x"}
    with pytest.raises(TypeError):
        conf.task_routes["b"] = "z"  # type: ignore[index]  # that it is refused is the test


def test_the_heartbeat_has_to_fit_twice_into_the_lease(conf: Config) -> None:
    with pytest.raises(ConfigError, match="less than half of worker_lease"):
        conf.worker_heartbeat = 7.5
    with pytest.raises(ConfigError, match="sets both at once"):
        conf.worker_lease = 6
    conf.update(worker_lease=2, worker_heartbeat=0.5)
    assert (conf.worker_lease, conf.worker_heartbeat) == (2, 0.5)
    with pytest.raises(ConfigError):
        Config({"AIOTASKQ_WORKER_LEASE": "5"})


def test_the_soft_limit_has_to_come_before_the_hard_one(conf: Config) -> None:
    conf.task_soft_time_limit = 5
    with pytest.raises(ConfigError, match="has to be less than task_time_limit"):
        conf.task_time_limit = 5
    conf.update(task_soft_time_limit=50, task_time_limit=60)
    with pytest.raises(ConfigError, match="sets both at once"):
        conf.task_soft_time_limit = 60
    assert (conf.task_soft_time_limit, conf.task_time_limit) == (50, 60)


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "value", "name"),
    [
        ("BROKER_URL", "redis://h", "broker_url"),
        ("CELERY_RESULT_BACKEND", "redis://h", "result_backend"),
        ("CELERY_TIMEZONE", "Europe/Oslo", "timezone"),
        ("CELERY_ENABLE_UTC", True, "enable_utc"),
        ("CELERY_IMPORTS", ("a",), "imports"),
        ("CELERY_INCLUDE", ["a"], "include"),
        ("CELERYBEAT_SCHEDULE", {}, "beat_schedule"),
        ("CELERYD_CONCURRENCY", 4, "worker_concurrency"),
        ("CELERYD_MAX_TASKS_PER_CHILD", 4, "worker_max_tasks_per_child"),
        ("CELERY_TASK_SERIALIZER", "msgpack", "task_serializer"),
        ("CELERY_RESULT_SERIALIZER", "msgpack", "result_serializer"),
        ("CELERY_ACCEPT_CONTENT", ["json"], "accept_content"),
        ("CELERY_TASK_RESULT_EXPIRES", 5, "result_expires"),
        ("CELERY_RESULT_EXPIRES", 5, "result_expires"),
        ("CELERY_DEFAULT_QUEUE", "q", "task_default_queue"),
        ("CELERY_ROUTES", {"a": "b"}, "task_routes"),
        ("CELERY_IGNORE_RESULT", True, "task_ignore_result"),
        ("CELERY_TRACK_STARTED", True, "task_track_started"),
        ("CELERY_TASK_TRACK_STARTED", True, "task_track_started"),
        ("CELERYD_TASK_TIME_LIMIT", 5, "task_time_limit"),
        ("CELERYD_HIJACK_ROOT_LOGGER", False, "worker_hijack_root_logger"),
        ("CELERYD_LOG_FORMAT", "%(message)s", "worker_log_format"),
        ("CELERY_SEND_EVENTS", False, "worker_send_task_events"),
        ("BROKER_TRANSPORT_OPTIONS", {}, "broker_transport_options"),
    ],
)
def test_an_old_name_means_the_new_one(conf: Config, old: str, value: Any, name: str) -> None:
    expected = SETTINGS[name].check(value)
    conf.update({old: value})
    assert conf[name] == conf[old] == conf.get(old) == getattr(conf, old) == expected
    assert old in conf
    other = Config({})
    setattr(other, old, value)
    assert other.as_dict() == conf.as_dict()


def test_a_setting_of_ours_has_no_old_name() -> None:
    assert "CELERYD_LEASE" not in NAMES
    assert "CELERY_PREFIX" not in NAMES
    assert "CELERY_SERIALIZER" not in NAMES  # CELERY_TASK_SERIALIZER is the name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("task_serialiser", "task_serializer"),
        ("worker_concurency", "worker_concurrency"),
        ("brokerurl", "broker_url"),
        ("CELERY_TASK_SERIALISER", "CELERY_TASK_SERIALIZER"),
        ("CELERYD_CONCURENCY", "CELERYD_CONCURRENCY"),
        ("task_ack_late", "task_acks_late"),
    ],
)
def test_an_unknown_name_offers_the_nearest(conf: Config, name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        setattr(conf, name, 1)
    assert str(caught.value) == f"unknown setting {name!r}; did you mean {meant!r}?"
    with pytest.raises(UnknownSetting, match=meant):
        conf[name]
    with pytest.raises(UnknownSetting, match=meant):
        getattr(conf, name)


def test_a_name_that_is_like_no_other_is_refused_without_an_offer(conf: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        conf.update(zzz=1)
    assert str(caught.value) == "unknown setting 'zzz'"
    with pytest.raises(ConfigError, match="is text"):
        conf.update({1: 2})  # type: ignore[dict-item]  # that it is refused is the test


def test_an_unknown_name_is_an_attribute_or_key_error(conf: Config) -> None:
    assert not hasattr(conf, "nothing_like_it")
    assert getattr(conf, "nothing_like_it", 3) == 3
    assert conf.get("nothing_like_it") is None
    assert conf.get("nothing_like_it", 3) == 3
    assert "nothing_like_it" not in conf
    assert 3 not in conf
    with pytest.raises(KeyError):
        conf["nothing_like_it"]


@pytest.mark.parametrize("method", ["update", "get", "as_dict", "load"])
def test_a_method_cannot_be_overwritten(conf: Config, method: str) -> None:
    with pytest.raises(ConfigError, match="unknown setting"):
        setattr(conf, method, 1)


def test_two_names_of_one_setting_have_to_agree(conf: Config) -> None:
    conf.update({"CELERY_TASK_RESULT_EXPIRES": timedelta(days=1), "result_expires": 86_400})
    with pytest.raises(ConfigError, match="BROKER_URL and broker_url"):
        conf.update({"BROKER_URL": "redis://a", "broker_url": "redis://b"})
    with pytest.raises(ConfigError, match="different values"):
        conf.update({"timezone": "UTC"}, timezone="Europe/Oslo")
    assert conf.broker_url is None


def test_update_sets_all_or_nothing(conf: Config) -> None:
    with pytest.raises(ConfigError):
        conf.update({"task_track_started": True}, worker_concurrency=-1)
    assert conf.task_track_started is False
    conf.update({"task_track_started": True}, worker_concurrency=7)
    assert (conf.task_track_started, conf.worker_concurrency) == (True, 7)


# --- settings of Celery without a counterpart ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fine", "wrong", "words"),
    [
        ("task_acks_late", True, False, "at least once"),
        ("task_acks_late", True, None, "at least once"),
        ("task_acks_late", True, 1, "at least once"),
        ("CELERY_ACKS_LATE", True, False, "at least once"),
        ("task_reject_on_worker_lost", True, False, "max_crashes"),
        ("worker_prefetch_multiplier", 1, 4, "what it can start"),
        ("worker_prefetch_multiplier", 1, 0, "what it can start"),
        ("CELERYD_PREFETCH_MULTIPLIER", 1, 4, "what it can start"),
        ("task_protocol", 2, 1, "one protocol"),
        ("broker_connection_retry", True, False, "always"),
        ("task_queues", None, ["a"], "--queues"),
        ("broker_use_ssl", False, True, "rediss://"),
    ],
)
def test_a_setting_of_celery_is_accepted_if_it_asks_for_the_only_behaviour(
    conf: Config, name: str, fine: Any, wrong: Any, words: str
) -> None:
    setattr(conf, name, fine)
    assert conf[name] == getattr(conf, name) == fine
    assert name in conf
    with pytest.raises(ConfigError) as caught:
        setattr(conf, name, wrong)
    assert str(caught.value).startswith(name)
    assert words in str(caught.value)


def test_a_setting_of_celery_that_has_no_counterpart_says_why(conf: Config) -> None:
    with pytest.raises(ConfigError, match="use worker_grace_period"):
        conf.update(worker_soft_shutdown_timeout=10)
    with pytest.raises(UnknownSetting, match="use worker_grace_period"):
        conf["worker_soft_shutdown_timeout"]
    assert "worker_soft_shutdown_timeout" not in conf
    assert conf.get("worker_soft_shutdown_timeout", 5) == 5


def test_a_refused_text_is_not_shown(conf: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        conf.update(redis_password="hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", CELERY_ONLY)
def test_every_foreign_setting_refuses_unknown_values(conf: Config, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is not supported"):
        conf.update({name: "something else"})


@pytest.mark.parametrize("option", REFUSED_DRIVER_OPTIONS)
def test_every_refused_driver_option_says_why(conf: Config, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is not supported: "):
        conf.update(broker_transport_options={option: 1})


# --- reading ------------------------------------------------------------------------------------


def test_routes(conf: Config) -> None:
    assert conf.route("a.b") is None
    conf.task_routes = {"a.*": "globbed", "a.b": {"queue": "exact"}, "*.c": "last", "A.?": "case"}
    assert conf.route("a.b") == "exact"
    assert conf.route("a.c") == "globbed"
    assert conf.route("b.c") == "last"
    assert conf.route("A.x") == "case"
    assert conf.route("z") is None


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@host:6379/0",
        "amqp://guest:hunter2@host//",
        "amqp://guest:hunter2@h/x/y@z@host//",
        "postgresql://host/db?user=me&password=hunter2",
        "redis+sentinel://a,b/main?db=1&sentinel_password=hunter2&x=1",
        "amqp://a:hunter2@h1//;amqp://b:hunter2@h2//",
    ],
)
def test_repr_masks_passwords(conf: Config, url: str) -> None:
    conf.update(broker_url=url, result_backend=url)
    assert "hunter2" not in repr(conf)
    assert "***" in repr(conf)
    assert conf.broker_url == url


def test_repr_shows_the_settings_that_were_set(conf: Config) -> None:
    assert repr(conf) == "Config()"
    conf.task_routes = {"a": "b"}
    conf.broker_url = "redis://me@host"
    assert repr(conf) == "Config(task_routes={'a': 'b'}, broker_url='redis://me@host')"


def test_it_reads_like_a_mapping(conf: Config) -> None:
    conf["max_crashes"] = 5
    assert dict(conf) == conf.as_dict()
    assert list(conf) == list(conf.keys()) == list(SETTINGS)
    assert len(conf) == len(SETTINGS)
    assert conf.get("max_crashes") == 5
    assert "max_crashes" in conf


def test_as_dict_can_be_given_to_another_process(conf: Config) -> None:
    conf.update(task_routes={"a": "b"}, worker_max_memory_per_child="1MB", result_expires=0)
    other = Config({})
    other.update(pickle.loads(pickle.dumps(conf.as_dict())))
    assert other.as_dict() == conf.as_dict()


def test_copies_are_equal_and_apart(conf: Config) -> None:
    conf.update(task_routes={"a": "b"}, max_crashes=5)
    for other in (copy.copy(conf), copy.deepcopy(conf), pickle.loads(pickle.dumps(conf))):
        assert other.as_dict() == conf.as_dict()
        assert repr(other) == repr(conf)
        other.max_crashes = 9
        assert conf.max_crashes == 5
