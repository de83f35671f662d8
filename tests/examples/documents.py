"""Generated parts of the documents: programs, copied from files, and tables, made from data.

``python -m tests.examples.documents [DOCUMENT ...]`` updates them in these documents, or in all. A
program follows a comment with the name of its file. A table stands between two comments.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aiotaskq.config import Config, Setting
from aiotaskq.contract.broker import Traits
from aiotaskq.drivers.memory import MemoryBroker
from aiotaskq.drivers.postgres import PostgresBroker
from aiotaskq.drivers.postgres import permissions as postgres_permissions
from aiotaskq.drivers.rabbitmq import RabbitBroker
from aiotaskq.drivers.redis import RedisBroker
from aiotaskq.drivers.redis import permissions as redis_permissions
from aiotaskq.drivers.redis.cluster import ClusterBroker
from aiotaskq.drivers.redis.keys import PREFIX_KEYS, QUEUE_KEYS, RedisKey
from aiotaskq.drivers.sqlite import SQLiteBroker
from aiotaskq.tasks.option_table import OPTIONS, Scope
from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_PROGRAM = re.compile(r"<!-- (examples/\S+) -->\n```python\n(.*?)```\n", re.DOTALL)
_TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a document."""

    section: str
    kind: str
    text: str


def blocks(document: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a document, each with its heading."""
    text = document.read_text(encoding="utf-8")
    # A comment in a shell session looks like a heading.
    bare = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
    headings = [(text_line(bare, found.start()), found[1]) for found in _HEADING.finditer(bare)]
    for found in _FENCE.finditer(text):
        line = text_line(text, found.start())
        section = [name for at, name in headings if at < line][-1]
        yield Block(section, found[1], found[2])


def text_line(text: str, at: int) -> int:
    """Return the number of the line at a position."""
    return text.count("\n", 0, at)


def updated(text: str) -> str:
    """Return the text of a document with its programs and tables updated."""

    def program(found: re.Match[str]) -> str:
        source = (ROOT / found[1]).read_text(encoding="utf-8")
        return f"<!-- {found[1]} -->\n```python\n{source}```\n"

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]()}\n<!-- end -->"

    return _TABLE.sub(table, _PROGRAM.sub(program, text))


def settings_table() -> str:
    """Return the table of all settings."""
    lines = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for name, setting in Config.settings().items():
        mark = "" if setting.ours else " ᶜ"
        cells = (f"`{name}`{mark}", _default(setting), setting.wants, setting.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(setting: Setting[Any, Any]) -> str:
    value = setting.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping | tuple | frozenset | set | list) and not value:
        return "empty"
    if isinstance(value, float):
        return f"`{value:g}`" if value != int(value) else f"`{int(value)}`"
    if isinstance(value, frozenset | set | tuple):
        return ", ".join(f"`{item}`" for item in sorted(value))
    return f"`{value}`"


_WHY = {
    "worker_lease": "longer than usual pauses of the garbage collector, the network or a busy "
    "machine; but without a supervisor, the tasks of a dead worker wait for this long",
    "worker_heartbeat": "four renewals may fail before the lease ends",
    "worker_grace_period": "less than the 30 s after which Docker and Kubernetes kill a process",
    "task_cancel_grace": "enough for `finally` blocks and for closing connections",
    "max_crashes": "one or two crashes may be chance; from the second on the task runs alone",
    "unknown_task_ttl": "longer than a rolling deployment",
    "dead_letter_max": "a number that people can still look through; limits the space in the store",
    "dead_letter_expires": "longer than a holiday",
    "worker_max_stuck_tasks": "each of them may hold a thread or memory for ever",
    "worker_loop_block_warning": "other tasks of the process are delayed noticeably",
    "worker_loop_block_limit": "killing a process also ends its other tasks, so you decide",
    "broker_publish_timeout": "longer than a restart of the server, shorter than a web request",
    "result_expires": "as in Celery",
    "max_payload_size": "large data belongs into another store, and a reference into the queue",
    "task_time_limit": "a long task is not a faulty task",
    "task_default_retry": "only you know whether a task may run twice",
}


def defaults_table() -> str:
    """Return the settings that matter for the guarantees, with the reasons for their defaults."""
    settings = Config.settings()
    lines = ["| setting | default | reason |", "|---|---|---|"]
    lines += [f"| `{name}` | {_default(settings[name])} | {why} |" for name, why in _WHY.items()]
    return "\n".join(lines) + "\n"


_BROKERS: Mapping[str, Traits] = {
    "memory": MemoryBroker.traits,
    "SQLite": SQLiteBroker.traits,
    "Redis, Sentinel": RedisBroker.traits,
    "Redis Cluster": ClusterBroker.traits,
    "PostgreSQL": PostgresBroker.traits,
    "RabbitMQ": RabbitBroker.traits,
}
_TRAITS = {
    "priorities": "priorities 0 to 9 within a queue",
    "unique": "stores a message with a `task_id` of yours once a day",
    "schedules": "stores schedules, and sends each due run once",
    "durable": "messages survive a restart of every process",
    "shared": "other processes can reach the broker",
    "leases": "a lease outlives the worker's connection, and others may renew or end it",
    "order": "messages handed back go to the head of their queue, suspects before others",
    "atomic": "a retry or a dead letter replaces its message in one step",
    "idempotent": "sending again after a lost reply stores nothing twice",
    "clock": "delays and expiry use the one clock of the store",
    "counts_delayed": "counts the delayed messages of each queue, and can purge them",
    "transactional": "stores a task in your transaction; the others need the outbox",
}


def traits_table() -> str:
    """Return the traits of each broker."""
    assert set(_TRAITS) == set(Traits.__struct_fields__)
    lines = [f"| | {' | '.join(_BROKERS)} |", f"|---|{'---|' * len(_BROKERS)}"]
    for trait, meaning in _TRAITS.items():
        has = ("yes" if getattr(traits, trait) else "no" for traits in _BROKERS.values())
        lines.append(f"| `{trait}`: {meaning} | {' | '.join(has)} |")
    return "\n".join(lines) + "\n"


def tree_table() -> str:
    """Return the layers, the highest first, each with its modules and their contents."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    lines = ["| layer | in `aiotaskq/` | contents |", "|---|---|---|"]
    shown = set()
    for number, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        for name in re.findall(r"\w+", layer):
            path = ROOT / "aiotaskq" / name
            file_name = f"{name}/" if path.is_dir() else f"{name}.py"
            source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if source.exists():  # a name in parentheses need not exist
                shown.add(name)
                lines.append(f"| {number} | `{file_name}` | {_summary(source)} |")
    there = {path.stem for path in (ROOT / "aiotaskq").glob("[a-z]*") if path.name != "py.typed"}
    assert shown == there, "a module without a layer, or a layer without a module"
    return "\n".join(lines) + "\n"


def _summary(source: Path) -> str:
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("``", "`").replace("\n", " ")


def redis_table(keys: Sequence[RedisKey]) -> str:
    """Return kinds of keys as rows."""
    lines = ["| key | type | contents |", "|---|---|---|"]
    lines += [f"| `{key.name}` | {key.type} | {key.holds} |" for key in keys]
    return "\n".join(lines) + "\n"


def redis_roles() -> str:
    """Return the rules of a user for each kind of program."""
    roles = {name: (one.meaning, one.rules()) for name, one in redis_permissions.ROLES.items()}
    clustered = redis_permissions.cluster_role(redis_permissions.ROLES["all"])
    roles["all-in-cluster"] = (
        "does all of this, in a cluster",
        clustered.rules("aiotaskq:{*}", more=redis_permissions.TOPOLOGY_COMMANDS["cluster"]),
    )
    commands = (
        f"# {meaning}\nACL SETUSER {name} on >password {' '.join(rules)}\n"
        for name, (meaning, rules) in roles.items()
    )
    return f"```text\n{''.join(commands)}```\n"


def postgres_roles() -> str:
    """Return the statements that give a role its rights, for each kind of program."""
    statements = (
        "\n".join((f"-- {role.meaning.replace('`', '')}", *role.grants(name)))
        for name, role in postgres_permissions.ROLES.items()
        if name != "all"
    )
    return "```text\n" + "\n".join(statements) + "\n```\n"


def options_table() -> str:
    """Return every option of tasks and calls as a row."""
    lines = [
        "| option | task | call | values | setting | Celery | meaning |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, option in OPTIONS.items():
        given = ("yes" if scope in option.scopes else "" for scope in Scope)
        setting = f"`{option.setting}`" if option.setting else ""
        celery = f"`{option.celery}`" if option.celery else ""
        if option.part_of:
            celery = f"part of `{option.part_of}`"
        cells = (f"`{name}`", *given, option.value_type.wants, setting, celery, option.meaning)
        row = " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in cells)
        lines.append(f"| {row} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "settings": settings_table,
    "options": options_table,
    "defaults": defaults_table,
    "traits": traits_table,
    "tree": tree_table,
    "redis_queue_keys": lambda: redis_table(QUEUE_KEYS),
    "redis_roles": redis_roles,
    "postgres_roles": postgres_roles,
    "redis_prefix_keys": lambda: redis_table(PREFIX_KEYS),
    **report.TABLES,
}


if __name__ == "__main__":
    for document in [Path(name).resolve() for name in sys.argv[1:]] or DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        document.write_text(updated(before), encoding="utf-8")
