"""The least permissions that users of a Redis server need, by the kind of program.

The commands of the scripts are read from the scripts themselves, with the shared functions that
each of them calls; those that Python sends are listed here. The rules in the documentation are
made from this module, and the conformance suites run as a user with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final

import msgspec

from aiotaskq.drivers.redis import scripts
from aiotaskq.drivers.redis.scripts import RedisScript

_CONNECTION = ("client|setname", "info", "select")
_FUNCTION = re.compile(r"^local function (\w+)\(.*?^end$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"redis\.p?call\(\s*'([A-Z]+)'")
_WORD = re.compile(r"\b[a-z_]+\b")

_QUEUES = ("queues", "ids:*", "{*}:*")
_RESULTS = ("result:*", "state:*")
_CANCELLED = ("cancelled", "cancelled:none", "none")
_SCHEDULES = ("schedules", "schedules:due", "none")
_ASIDE = ("queues:aside:*", "cancelled:aside:*")
_SCHEDULES_ASIDE = ("schedules:aside:*", "schedules:due:aside:*")


class RedisRole(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of program, and the permissions that its user needs.

    Attributes:
        meaning: What the program does.
        scripts: The scripts that it runs.
        sends: The commands that it sends by itself.
        keys: Patterns of keys, behind the prefix and a colon.
        listens: Whether it subscribes to outcomes, or publishes them.
    """

    meaning: str
    scripts: tuple[RedisScript, ...] = ()
    sends: tuple[str, ...] = ()
    keys: tuple[str, ...]
    listens: bool = False

    def commands(self) -> list[str]:
        """Return all commands, sorted, in the lower case of ACL rules."""
        found = {*_CONNECTION, *self.sends}
        if self.scripts:
            found |= {"eval", "evalsha"}
        for script in self.scripts:
            found |= commands_of(script)
        return sorted(found)

    def rules(self, prefix: str = "aiotaskq", *, more: Iterable[str] = ()) -> list[str]:
        """Return the rules of a user, as ``ACL SETUSER`` takes them.

        Args:
            prefix: The setting `prefix`; of a cluster, with ``:{*}`` behind it.
            more: More commands, of the way to connect.
        """
        root = prefix.partition(":")[0]
        return [
            "resetkeys",
            "resetchannels",
            *(f"~{prefix}:{key}" for key in self.keys),
            *([f"&{root}:results"] if self.listens else []),
            "-@all",
            *(f"+{command}" for command in sorted({*self.commands(), *more})),
        ]


def commands_of(script: RedisScript) -> frozenset[str]:
    """Return the commands that a script may call, in lower case."""
    return _commands_in(script.source.decode())


@cache
def _commands_in(source: str) -> frozenset[str]:
    functions = {found[1]: found[0] for found in _FUNCTION.finditer(source)}
    rest = _FUNCTION.sub("", source)
    reached: set[str] = set()
    texts = [rest]
    commands: set[str] = set()
    while texts:
        text = re.sub(r"--.*", "", texts.pop())
        commands |= {name.lower() for name in _COMMAND.findall(text)}
        called = (set(_WORD.findall(text)) & functions.keys()) - reached
        reached |= called
        texts += [functions[name] for name in called]
    return frozenset(commands)


_SENDER = RedisRole(
    meaning="sends tasks, and does nothing else",
    scripts=(scripts.PUBLISH, scripts.CONSUMERS),
    sends=("sadd", "smembers", "smismember", "time", "zmscore"),
    keys=(*_QUEUES, "cancelled"),
)
_READER = RedisRole(
    meaning="reads results, and waits for them",
    sends=("mget", "ping", "subscribe", "time"),
    keys=_RESULTS,
    listens=True,
)


def _union(meaning: str, *roles: RedisRole) -> RedisRole:
    """Return a role that may do all that others may."""

    def together(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one for part in parts for one in part))

    digests = {one.digest: one for role in roles for one in role.scripts}
    return RedisRole(
        meaning=meaning,
        scripts=tuple(digests.values()),
        sends=together(role.sends for role in roles),
        keys=together(role.keys for role in roles),
        listens=any(role.listens for role in roles),
    )


_CLIENT = _union(
    "sends tasks, waits for results, cancels and forgets: a web application",
    _SENDER,
    _READER,
    RedisRole(
        meaning="cancels and forgets",
        scripts=(scripts.CANCEL, scripts.DROP_CANCELLED, scripts.STORE),
        sends=("del", "zremrangebyscore"),
        keys=_CANCELLED,
    ),
)
_WORKER = _union(
    "runs tasks, which may do all that a client does",
    _CLIENT,
    RedisRole(
        meaning="runs tasks",
        scripts=(
            scripts.CLOSE,
            scripts.CONSUMERS,
            scripts.DONE,
            scripts.END,
            scripts.FETCH,
            scripts.MAINTAIN,
            scripts.NEWS,
            scripts.OPEN,
            scripts.PEEK,
            scripts.RENEW,
            scripts.SET_ASIDE,
            scripts.SETTLE,
            scripts.WAKE,
        ),
        sends=("blpop", "hkeys", "sscan"),
        keys=(*_QUEUES, *_ASIDE),
    ),
)
_SCHEDULER = _union(
    "runs schedules: `aiotaskq scheduler`",
    RedisRole(
        meaning="runs schedules",
        scripts=(scripts.COMPARE_AND_SWAP, scripts.DUE, scripts.LOAD, scripts.SET_ASIDE),
        sends=("hkeys", "mget", "sadd", "smembers", "smismember", "time", "zrem"),
        keys=(*_QUEUES, *_SCHEDULES, *_SCHEDULES_ASIDE, "result:*", "state:*"),
    ),
)
_OPERATOR = _union(
    "uses every command but `worker`",
    _CLIENT,
    _SCHEDULER,
    RedisRole(
        meaning="looks at queues and dead letters, and changes them",
        scripts=(
            scripts.CONSUMERS,
            scripts.DEAD,
            scripts.DEPTH,
            scripts.DISCARD,
            scripts.PURGE,
            scripts.REVIVE,
            scripts.SET_ASIDE,
            scripts.WAKE,
        ),
        sends=("sscan", "zscore"),
        keys=(*_QUEUES, *_ASIDE),
    ),
)
_CLUSTER_MOVES = RedisRole(
    meaning="moves tasks from one shard of a cluster to another",
    scripts=(scripts.DROP_PARCEL, scripts.PACK, scripts.UNPACK),
    sends=("ping", "set", "zmscore", "zrem"),
    keys=_QUEUES,
)

ROLES: Final[Mapping[str, RedisRole]] = {
    "all": _union("does all of what follows", _WORKER, _SCHEDULER, _OPERATOR),
    "sender": _SENDER,
    "reader": _READER,
    "client": _CLIENT,
    "worker": _WORKER,
    "scheduler": _SCHEDULER,
    "operator": _OPERATOR,
}
"""The roles of programs, by name."""

TOPOLOGY_COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "sentinel": ("role",),
    "cluster": ("cluster|slots",),
    "wait_replicas": ("wait",),
}
"""The commands that some URLs need in addition."""


def cluster_role(role: RedisRole) -> RedisRole:
    """Return the role as a cluster needs it, where programs also move tasks between shards."""
    return role if role is _READER else _union(role.meaning, role, _CLUSTER_MOVES)
