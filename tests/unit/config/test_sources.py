"""Sources of settings: modules, classes, mappings, and the environment."""

from __future__ import annotations

import datetime
import itertools
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiotaskq.config import Config, UnknownSetting
from aiotaskq.config.settings import SETTINGS
from aiotaskq.errors import ConfigError

_counter = itertools.count()


@pytest.fixture
def conf() -> Config:
    return Config({})


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str, name: str | None = None) -> str:
        name = name or f"settings_of_a_test_{next(_counter)}"
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


# --- loading ------------------------------------------------------------------------------------

A_MODULE = """
from __future__ import annotations
import os, logging
import datetime as dt
from datetime import timedelta, timezone
from pathlib import Path
import email.policy as _policy

logger = logging.getLogger("x")
task_logger = logger
HOME = Path("/")
DEBUG = True
Mixed_Case = 1
_task_serialiser = "private"
__version__ = "1"
seconds = 30

def worker_name(): return "w"
def imports(): return []
class Helper: task_serialiser = 1

broker_url = "redis://localhost/" + str(len(os.sep))
result_expires = timedelta(seconds=seconds)
CELERY_TIMEZONE = "Europe/Oslo"
task_acks_late = True
"""


def test_other_names_of_a_module_are_ignored(
    conf: Config, write_module: Callable[..., str]
) -> None:
    conf.load(write_module(A_MODULE))
    assert conf.broker_url == "redis://localhost/1"
    assert conf.result_expires == 30
    assert conf.timezone == "Europe/Oslo"
    assert conf.imports == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("task_serialiser = 'json'", "did you mean 'task_serializer'"),
        ("incldue = ['a']", "did you mean 'include'"),
        ("worker_anything_else = 1", "unknown setting 'worker_anything_else'"),
        ("CELERY_ANYTHING = 1", "unknown setting 'CELERY_ANYTHING'"),
        ("CELERYD_CONCURENCY = 1", "did you mean 'CELERYD_CONCURRENCY'"),
        ("CELERYBEAT_ANYTHING = 1", "unknown setting"),
        ("BROKER_ULR = 'redis://h'", "did you mean 'BROKER_URL'"),
        ("CELERY_BROKER_URL = 'redis://h'", "namespace='CELERY'"),
        ("task_serializer = None", "task_serializer = None: wants"),
        ("imports = print", "imports = <built-in function print>: wants"),
        ("class X: pass\ntimezone = X", "timezone"),
        ("task_acks_late = False", "at least once"),
        ("BROKER_URL = 'redis://a'\nbroker_url = 'redis://b'", "different values"),
    ],
)
def test_a_module_with_a_mistake_is_refused_whole(
    conf: Config, write_module: Callable[..., str], line: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        conf.load(write_module(f"task_track_started = True\n{line}\n"))
    assert words in str(caught.value)
    assert conf.task_track_started is False


def test_a_name_that_looks_like_a_setting_has_to_be_renamed(
    conf: Config, write_module: Callable[..., str]
) -> None:
    with pytest.raises(UnknownSetting, match="begin with an underscore"):
        conf.load(write_module("task_prefix = 'x'"))
    conf.load(write_module("_task_prefix = 'x'"))


class Base:
    task_track_started = True


class Production(Base):
    BROKER_URL = "redis://h"

    class Inner:
        worker_concurrency = 3

    def __init__(self) -> None:
        self.worker_concurrency = 9

    @property
    def task_default_queue(self) -> str:
        return "from-a-property"


class Plain:
    timezone = "Europe/Oslo"
    update = print


def test_classes_instances_modules_and_mappings(conf: Config) -> None:
    conf.load(Plain)
    assert conf.timezone == "Europe/Oslo"
    conf.load(Production())
    assert (conf.task_track_started, conf.broker_url) == (True, "redis://h")
    assert (conf.worker_concurrency, conf.task_default_queue) == (9, "from-a-property")
    module = types.ModuleType("anything")
    vars(module).update(CELERY_IMPORTS=["a"], datetime=datetime)
    conf.load(module)
    assert conf.imports == ("a",)
    conf.load({"include": ["b"]})
    assert conf.include == ("b",)
    other = Config({})
    other.load(conf)
    assert other.as_dict() == conf.as_dict()


def test_every_item_of_a_mapping_has_to_be_a_setting(conf: Config) -> None:
    with pytest.raises(ConfigError, match="unknown setting 'DEBUG'"):
        conf.load({"DEBUG": True, "imports": ["a"]})
    assert conf.imports == ()


def test_dotted_names(conf: Config, write_module: Callable[..., str]) -> None:
    package = f"package_of_a_test_{next(_counter)}"
    write_module("", f"{package}.__init__")
    write_module(
        "class Outer:\n    max_crashes = 1\n    class Inner:\n        max_crashes = 2\n"
        "table = {'max_crashes': 3}\nmax_crashes = 4\n",
        f"{package}.config",
    )
    for path, expected in [
        (f"{package}.config.Outer", 1),
        (f"{package}.config:Outer", 1),
        (f"{package}.config:Outer.Inner", 2),
        (f"{package}.config:table", 3),
        (f"{package}.config", 4),
    ]:
        conf.load(path)
        assert conf.max_crashes == expected


@pytest.mark.parametrize(
    "path", ["no_such_module", "no.such.module", "os:nothing", "os.nothing", "", "a b", "x:", ".os"]
)
def test_a_missing_source_is_one_clear_error(conf: Config, path: str) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        conf.load(path)


@pytest.mark.parametrize("source", [None, 3, b"os", ["imports"]])
def test_objects_without_settings_are_refused(conf: Config, source: object) -> None:
    with pytest.raises(ConfigError, match="holds no settings"):
        conf.load(source)


def test_a_mistake_inside_the_module_keeps_its_traceback(
    conf: Config, write_module: Callable[..., str]
) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        conf.load(write_module("import no_such_dependency"))
    with pytest.raises(ZeroDivisionError):
        conf.load(write_module("1 / 0"))


def test_a_namespace_takes_its_own_and_nothing_else(conf: Config) -> None:
    settings = {
        "SECRET_KEY": "x",
        "BROKER_URL": "redis://not-this-one",
        "CELERY_BROKER_URL": "redis://h",
        "CELERY_TASK_SERIALIZER": "msgpack",
        "CELERY_TASK_RESULT_EXPIRES": 60,
        "CELERY_WORKER_CONCURRENCY": 5,
        "CELERY_BEAT_SCHEDULE": {},
        "CELERY_TASK_ACKS_LATE": True,
    }
    for source in (settings, types.SimpleNamespace(**settings)):
        fresh = Config({})
        fresh.load(source, namespace="CELERY")
        assert fresh.broker_url == "redis://h"
        assert fresh.task_serializer == "msgpack"
        assert fresh.result_expires == 60
        assert fresh.worker_concurrency == 5
    conf.load({"queue_prefix": "shop", "other": 1}, namespace="queue_")
    assert conf.prefix == "shop"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"CELERY_BROKR_URL": "redis://h"}, "did you mean 'CELERY_BROKER_URL'"),
        ({"CELERY_ZZZ": "x"}, "unknown setting 'CELERY_ZZZ'"),
        ({"CELERY_WORKER_CONCURRENCY": "x"}, "CELERY_WORKER_CONCURRENCY (worker_concurrency) ="),
        ({"CELERY_TASK_ACKS_LATE": False}, "CELERY_TASK_ACKS_LATE (task_acks_late) = False"),
        (
            {"CELERY_TASK_RESULT_EXPIRES": 1, "CELERY_RESULT_EXPIRES": 2},
            "CELERY_TASK_RESULT_EXPIRES and CELERY_RESULT_EXPIRES",
        ),
    ],
)
def test_mistakes_in_a_namespace(conf: Config, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        conf.load(settings, namespace="CELERY")
    assert words in str(caught.value)


# --- the environment ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "read"),
    [
        ("BROKER_URL", "redis://h", "redis://h"),
        ("RESULT_BACKEND", "disabled", "disabled://"),
        ("TASK_SERIALIZER", "msgpack", "msgpack"),
        ("ACCEPT_CONTENT", "json, pickle", ("json", "pickle")),
        ("ACCEPT_CONTENT", '["application/json"]', ("json",)),
        ("IMPORTS", "a.b", ("a.b",)),
        ("RESULT_EXPIRES", "0", None),
        ("RESULT_EXPIRES", "none", None),
        ("RESULT_EXPIRES", "1.5", 1.5),
        ("TASK_TRACK_STARTED", "Yes", True),
        ("WORKER_HIJACK_ROOT_LOGGER", "0", False),
        ("WORKER_CONCURRENCY", " 12 ", 12),
        ("WORKER_THREADS", "none", None),
        ("WORKER_MAX_MEMORY_PER_CHILD", "200MB", 204_800),
        ("TASK_DEFAULT_PRIORITY", "3", 3),
        ("TASK_ROUTES", '{"a.*": "slow"}', {"a.*": "slow"}),
        ("ENABLE_UTC", "true", True),
        ("WORKER_CONCURRENCY", "", 100),
    ],
)
def test_a_variable_sets_a_setting(variable: str, text: str, read: Any) -> None:
    conf = Config({f"AIOTASKQ_{variable}": text})
    assert conf[variable.lower()] == read


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("WORKER_CONCURRENCY", "many"),
        ("WORKER_CONCURRENCY", "0"),
        ("WORKER_CONCURRENCY", "1.5"),
        ("RESULT_EXPIRES", "soon"),
        ("RESULT_EXPIRES", "1e999"),
        ("TASK_TRACK_STARTED", "maybe"),
        ("ACCEPT_CONTENT", "yaml"),
        ("ACCEPT_CONTENT", "[json"),
        ("TASK_ROUTES", "a=b"),
        ("BROKER_URL", "user:hunter2@h"),
        ("ENABLE_UTC", "false"),
        ("TASK_ACKS_LATE", "false"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config({f"AIOTASKQ_{variable}": text})
    assert str(caught.value).startswith(f"AIOTASKQ_{variable}")
    assert "hunter2" not in str(caught.value)


def test_an_unknown_variable_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'AIOTASKQ_WORKER_CONCURRENCY'"):
        Config({"AIOTASKQ_WORKER_CONCURENCY": "1"})
    Config({"AIOTASKQ_TESTS_ANYTHING": "1", "AIOTASK_X": "", "PATH": "/"})


# Of a Service named aiotaskq with two ports, as `kubectl exec ... env` shows them.
KUBERNETES = """
AIOTASKQ_SERVICE_HOST=10.0.0.1
AIOTASKQ_SERVICE_PORT=6379
AIOTASKQ_SERVICE_PORT_REDIS=6379
AIOTASKQ_SERVICE_PORT_HTTP_METRICS=9121
AIOTASKQ_PORT=tcp://10.0.0.1:6379
AIOTASKQ_PORT_6379_TCP=tcp://10.0.0.1:6379
AIOTASKQ_PORT_6379_TCP_PROTO=tcp
AIOTASKQ_PORT_6379_TCP_PORT=6379
AIOTASKQ_PORT_6379_TCP_ADDR=10.0.0.1
AIOTASKQ_PORT_9121_UDP=udp://10.0.0.1:9121
AIOTASKQ_PORT_9121_UDP_PROTO=udp
AIOTASKQ_PORT_9121_UDP_PORT=9121
AIOTASKQ_PORT_9121_UDP_ADDR=10.0.0.1
"""
# Of a link to a container with the alias aiotaskq.
DOCKER = """
AIOTASKQ_NAME=/web_1/aiotaskq
AIOTASKQ_PORT=tcp://172.17.0.5:5672
AIOTASKQ_PORT_5671_TCP=tcp://172.17.0.5:5671
AIOTASKQ_PORT_5671_TCP_START=tcp://172.17.0.5:5671
AIOTASKQ_PORT_5671_TCP_PORT_START=5671
AIOTASKQ_PORT_5671_TCP_END=tcp://172.17.0.5:5672
AIOTASKQ_PORT_5671_TCP_PORT_END=5672
AIOTASKQ_ENV_RABBITMQ_VERSION=4.0.3
AIOTASKQ_ENV_worker_concurrency=x y
AIOTASKQ_ENV_EMPTY=
"""


def variables(text: str, service: str = "AIOTASKQ") -> dict[str, str]:
    lines = text.replace("AIOTASKQ_", f"{service}_").split("\n")
    return dict(line.split("=", 1) for line in lines if line)


@pytest.mark.parametrize("environment", [KUBERNETES, DOCKER])
@pytest.mark.parametrize(
    "service",
    [
        "AIOTASKQ",
        "AIOTASKQ_REDIS",
        "AIOTASKQ_BROKER",  # AIOTASKQ_BROKER_PORT would be a setting of Celery
        "AIOTASKQ_BROKER_URL",
        "AIOTASKQ_WORKER",
    ],
)
def test_variables_of_services_are_no_settings(environment: str, service: str) -> None:
    links = variables(environment, service)
    conf = Config({**links, "AIOTASKQ_WORKER_CONCURRENCY": "7"})
    assert conf.worker_concurrency == 7
    assert conf.as_dict() == Config({"AIOTASKQ_WORKER_CONCURRENCY": "7"}).as_dict()


def test_addresses_of_ipv6_belong_to_services() -> None:
    Config(variables(KUBERNETES.replace("//10.0.0.1:", "//[fd00::1]:").replace("10.0.0.1", "::1")))


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("AIOTASKQ_REDIS_PORT", "6379"),
        ("AIOTASKQ_PORT", "redis://10.0.0.1:6379"),
        ("AIOTASKQ_PORT_TCP", "tcp://10.0.0.1:6379"),
        ("AIOTASKQ_WORKER_NAME", "w1"),
        ("AIOTASKQ_SERVICE_PORT", "many"),
        ("AIOTASKQ_WORKER_ENV_CONCURRENCY", "7"),
    ],
)
def test_what_only_looks_like_a_service_is_refused(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        Config({**variables(KUBERNETES), variable: text})


def test_no_setting_has_the_name_of_a_part_of_a_service() -> None:
    ends = r".*(_PORT(_\d+_\w+)?|_SERVICE_(HOST|PORT\w*)|_NAME|_ENV_\w+)"
    assert not [line.variable for line in SETTINGS.values() if re.fullmatch(ends, line.variable)]


def test_a_retry_comes_from_code_only() -> None:
    with pytest.raises(ConfigError, match=r"AIOTASKQ_TASK_DEFAULT_RETRY.*set in code"):
        Config({"AIOTASKQ_TASK_DEFAULT_RETRY": "3"})
    assert Config({"AIOTASKQ_TASK_DEFAULT_RETRY": "none"}).task_default_retry is None


def test_code_goes_before_the_environment_and_that_before_the_default() -> None:
    conf = Config({"AIOTASKQ_WORKER_CONCURRENCY": "5", "AIOTASKQ_MAX_CRASHES": "6"})
    assert (conf.worker_concurrency, conf.max_crashes, conf.worker_processes) == (5, 6, 1)
    conf.load({"CELERYD_CONCURRENCY": 7})
    assert (conf.worker_concurrency, conf.max_crashes) == (7, 6)


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOTASKQ_MAX_CRASHES", "8")
    assert Config().max_crashes == 8


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_names_its_variable(name: str) -> None:
    assert SETTINGS[name].variable == f"AIOTASKQ_{name.upper()}"
    Config({SETTINGS[name].variable: ""})
