"""Drivers that other distributions bring, found by their entry points.

An installed distribution claims a URL scheme with an entry point of the group `aiotaskq.drivers`:
its name is the scheme, its value names a `Driver`. The built-in schemes are looked up first, so no
distribution can take one of them.

Theory of operation. The metadata of all installed distributions is read only for a scheme that is
neither built in nor loaded already, since that takes milliseconds. A driver that was loaded is
kept; a failure is not, so that what was mended or installed meanwhile is found. The caller holds
the lock of `aiotaskq.drivers` all the while.

Nothing here trusts what it finds. Metadata that cannot be read is passed over, an entry point is
loaded only for its own scheme, and whatever goes wrong with it becomes a `ConfigError` that names
the distribution, the entry point and the mend. A broken distribution costs nobody another scheme.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from aiotaskq.contract.broker import Broker
from aiotaskq.contract.results import ResultBackend
from aiotaskq.errors import AioTaskQError, ConfigError

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint  # costs more than most need

GROUP = "aiotaskq.drivers"
"""The group of the entry points."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_loaded: dict[str, InstalledDriver] = {}  # by scheme


class BrokerFactory(Protocol):
    """The class of a broker, or a function that makes one."""

    def __call__(self, url: str, /, *, prefix: str) -> Broker:
        """Return a closed broker.

        Args:
            url: As the application was given it, password included.
            prefix: The setting `prefix`: it keeps applications on one server apart.

        Raises:
            ConfigError: The URL is wrong.
        """
        ...


class BackendFactory(Protocol):
    """The class of a result backend, or a function that makes one."""

    def __call__(self, url: str, /, *, prefix: str) -> ResultBackend:
        """Return a closed result backend; the arguments are those of `BrokerFactory`."""
        ...


class Driver(msgspec.Struct, frozen=True, kw_only=True):
    """The classes that serve a URL scheme: what an entry point of `aiotaskq.drivers` names.

    At least one of the two is given::

        driver = Driver(broker=FolderBroker, backend=FolderBackend)

    Attributes:
        broker: Makes the broker; None: the scheme is for results only.
        backend: Makes the result backend; None: the scheme is for messages only.
    """

    broker: BrokerFactory | None = None
    backend: BackendFactory | None = None


class Role(msgspec.Struct, frozen=True):
    """What a driver is asked for.

    Attributes:
        title: Its name in errors.
        attribute: The attribute of `Driver` that makes it.
        protocol: What it must have.
        setting: The setting that holds its URL.
    """

    title: str
    attribute: str
    protocol: type
    setting: str


BROKER = Role("broker", "broker", Broker, "broker_url")
BACKEND = Role("result backend", "backend", ResultBackend, "result_backend")


class Claim(msgspec.Struct, frozen=True):
    """An entry point of the group, and the distribution that declares it."""

    scheme: str
    entry: EntryPoint
    distribution: str  # its name; where it lies if it has none
    version: str

    def __str__(self) -> str:
        """Return what errors call it."""
        entry = f"{self.entry.name} = {self.entry.value}"
        where = f"{self.distribution} {self.version}".strip()
        return f"the entry point {entry!r} of the distribution {where}"


class InstalledDriver:
    """A driver of another distribution, loaded.

    Args:
        claim: From where it comes.
        driver: What the entry point names.
    """

    def __init__(self, claim: Claim, driver: Driver) -> None:
        self._claim = claim
        self._driver = driver

    def create(self, role: Role, url: str, prefix: str) -> Any:
        """Return a closed broker or result backend.

        Raises:
            ConfigError: The scheme has none, it refuses the URL, or what it makes lacks something.
        """
        claim = self._claim
        factory = getattr(self._driver, role.attribute)
        if factory is None:
            other = BROKER if role is BACKEND else BACKEND
            raise ConfigError(
                f"no {role.title} for {claim.scheme}://: {claim} gives a {other.title} only;"
                f" set {role.setting} to a URL of another scheme"
            )
        try:
            made = factory(url, prefix=prefix)
        except AioTaskQError:
            raise
        except Exception as error:  # not shown: it may hold the password
            raise ConfigError(
                f"no {role.title} for {claim.scheme}://: {claim} fails with"
                f" {type(error).__name__} when it makes one; {_mend(claim)}"
            ) from error
        if lacking := [name for name in _members(role.protocol) if not hasattr(type(made), name)]:
            raise ConfigError(
                f"no {role.title} for {claim.scheme}://: {claim} makes a"
                f" {type(made).__name__}, which lacks {', '.join(lacking)};"
                f" it may be meant for another version of aiotaskq: {_mend(claim)}"
            )
        return made


def find_driver(scheme: str) -> InstalledDriver | None:
    """Return the driver of a scheme, in lower case; None if no distribution claims it.

    Raises:
        ConfigError: Several claim it, or the driver cannot be loaded.
    """
    if scheme not in _loaded:
        claims = [claim for claim in _claims() if claim.scheme == scheme]
        if not claims:
            return None
        if len(claims) > 1:
            raise ConfigError(
                f"several drivers for {scheme}://: {' and '.join(map(str, claims))};"
                " uninstall all but one of them"
            )
        _loaded[scheme] = InstalledDriver(claims[0], _load(claims[0]))
    return _loaded[scheme]


def claimed_schemes() -> dict[str, list[str]]:
    """Return the distributions that claim each scheme. None of their code is run."""
    found: dict[str, list[str]] = {}
    for claim in _claims():
        if _SCHEME.fullmatch(claim.scheme):
            found.setdefault(claim.scheme, []).append(claim.distribution)
    return found


def _load(claim: Claim) -> Driver:
    try:
        driver = claim.entry.load()
    except (Exception, SystemExit) as error:  # a module runs arbitrary code when it is imported
        from traceback import format_exception_only

        what = " ".join(format_exception_only(error)[-1].split())
        raise ConfigError(
            f"no driver for {claim.scheme}://: {claim} cannot be loaded: {what}; {_mend(claim)}"
        ) from error
    if not isinstance(driver, Driver):
        raise ConfigError(
            f"no driver for {claim.scheme}://: {claim} names a {type(driver).__name__},"
            f" and must name an aiotaskq.drivers.Driver; {_mend(claim)}"
        )
    given = [one for one in (driver.broker, driver.backend) if one is not None]
    if not given or not all(map(callable, given)):
        raise ConfigError(
            f"no driver for {claim.scheme}://: {claim} names a Driver without a class for the"
            f" broker or the result backend; {_mend(claim)}"
        )
    return driver


def _claims() -> Iterator[Claim]:
    """Yield the entry points of the group, from the distributions that an import would find."""
    from importlib import metadata

    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            entries = [one for one in distribution.entry_points if one.group == GROUP]
        except Exception:  # of whatever kind: it is not ours to mend
            continue
        name, version = _named(distribution)
        # The first one of a name on the path hides the others, as it does for an import.
        known = re.sub(r"[-_.]+", "-", name).lower()
        if known in seen:
            continue
        seen.add(known)
        for entry in entries:
            yield Claim(entry.name.lower(), entry, name, version)


def _named(distribution: Distribution) -> tuple[str, str]:
    try:
        name, version = distribution.metadata["Name"], distribution.version
    except Exception:  # no metadata but the entry points
        name = version = ""
    return str(name or f"in {distribution.locate_file('')}"), str(version or "")


def _members(protocol: type) -> list[str]:
    names = {*vars(protocol), *protocol.__annotations__}
    return sorted(name for name in names if not name.startswith("_"))


def _mend(claim: Claim) -> str:
    if not claim.version:  # it has no metadata to be uninstalled by
        return "mend it or remove it"
    return f"install a version that works, or do without it: pip uninstall {claim.distribution}"
