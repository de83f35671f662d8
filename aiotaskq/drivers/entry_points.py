"""Drivers of other distributions, found by their entry points.

An installed distribution claims a URL scheme with an entry point of the group `aiotaskq.drivers`:
the name of the entry point is the scheme, and its value names a `Driver`. Built-in schemes are
looked up first, so no distribution can take one of them.

Theory of operation. The metadata of all installed distributions is read only for a scheme that is
neither built in nor loaded already, since this takes milliseconds. A loaded driver is kept. A
failure is not kept, so a distribution that is repaired or installed later is found. The caller
holds the lock of `aiotaskq.drivers` meanwhile.

Nothing that is found here is trusted. Metadata that cannot be read is skipped, an entry point is
loaded only for its own scheme, and each of its faults becomes a `ConfigError` that names the
distribution, the entry point and the remedy. A broken distribution disables no other scheme.
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
    from importlib.metadata import Distribution, EntryPoint  # importing it takes a while

GROUP = "aiotaskq.drivers"
"""The group of the entry points."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_loaded: dict[str, InstalledDriver] = {}  # by scheme


class BrokerFactory(Protocol):
    """The class of a broker, or a function that returns one."""

    def __call__(self, url: str, /, *, prefix: str) -> Broker:
        """Return a closed broker.

        Args:
            url: As it was given to the application, including the password.
            prefix: The setting `prefix`, which separates applications that share a server.

        Raises:
            ConfigError: The URL is wrong.
        """
        ...


class BackendFactory(Protocol):
    """The class of a result backend, or a function that returns one."""

    def __call__(self, url: str, /, *, prefix: str) -> ResultBackend:
        """Return a closed result backend. The arguments are those of `BrokerFactory`."""
        ...


class Driver(msgspec.Struct, frozen=True, kw_only=True):
    """The classes that serve a URL scheme: the object that an entry point names.

    At least one of the two is given. Each is called as ``cls(url, prefix=prefix)``::

        driver = Driver(broker=FolderBroker, backend=FolderBackend)

    Attributes:
        broker: The class of the broker; None if the scheme serves results only.
        backend: The class of the result backend; None if the scheme serves messages only.
    """

    broker: BrokerFactory | None = None
    backend: BackendFactory | None = None


class Role(msgspec.Struct, frozen=True):
    """One of the two uses of a driver.

    Attributes:
        title: Its name in errors.
        attribute: The attribute of `Driver` for it.
        protocol: The protocol that the created object implements.
        setting: The setting that holds the URL.
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
    distribution: str  # its name, or its folder if it has no name
    version: str

    def __str__(self) -> str:
        """Return a description for errors."""
        entry = f"{self.entry.name} = {self.entry.value}"
        where = f"{self.distribution} {self.version}".strip()
        return f"the entry point {entry!r} of the distribution {where}"

    @property
    def remedy(self) -> str:
        """Advice for errors."""
        if not self.version:  # pip cannot uninstall it
            return "repair it or remove it"
        return f"install a version that works, or uninstall it: pip uninstall {self.distribution}"


class InstalledDriver:
    """A loaded driver of another distribution.

    Args:
        claim: Its entry point.
        driver: The object that the entry point names.
    """

    def __init__(self, claim: Claim, driver: Driver) -> None:
        self._claim = claim
        self._driver = driver

    def create(self, role: Role, url: str, prefix: str) -> Any:
        """Return a closed broker or result backend.

        Raises:
            ConfigError: The driver has none, refuses the URL, fails, or creates an object that
                does not implement the protocol.
        """
        claim = self._claim
        factory = getattr(self._driver, role.attribute)
        if factory is None:
            other = BROKER if role is BACKEND else BACKEND
            raise ConfigError(
                f"no {role.title} for {claim.scheme}://: {claim} provides a {other.title} only;"
                f" set {role.setting} to a URL of another scheme"
            )
        try:
            made = factory(url, prefix=prefix)
        except AioTaskQError:
            raise
        except Exception as error:  # its text is not shown: it may contain the password
            raise ConfigError(
                f"no {role.title} for {claim.scheme}://: {claim} raises {type(error).__name__}"
                f" instead of creating one; {claim.remedy}"
            ) from error
        if missing := [name for name in _members(role.protocol) if not hasattr(type(made), name)]:
            raise ConfigError(
                f"no {role.title} for {claim.scheme}://: {claim} creates a {type(made).__name__}"
                f" without {', '.join(missing)}, perhaps for another version of aiotaskq;"
                f" {claim.remedy}"
            )
        return made


def find_driver(scheme: str) -> InstalledDriver | None:
    """Return the driver of a scheme in lower case; None if no distribution claims it.

    Raises:
        ConfigError: Several distributions claim it, or the driver cannot be loaded.
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
    """Return the distributions that claim each scheme, without importing any of them."""
    found: dict[str, list[str]] = {}
    for claim in _claims():
        if _SCHEME.fullmatch(claim.scheme):
            found.setdefault(claim.scheme, []).append(claim.distribution)
    return found


def _load(claim: Claim) -> Driver:
    try:
        driver = claim.entry.load()
    except (Exception, SystemExit) as error:  # importing a module runs arbitrary code
        from traceback import format_exception_only

        what = " ".join(format_exception_only(error)[-1].split())
        raise ConfigError(
            f"no driver for {claim.scheme}://: {claim} cannot be loaded: {what}; {claim.remedy}"
        ) from error
    if not isinstance(driver, Driver):
        raise ConfigError(
            f"no driver for {claim.scheme}://: {claim} names a {type(driver).__name__}, but it must"
            f" name an aiotaskq.drivers.Driver; {claim.remedy}"
        )
    given = [one for one in (driver.broker, driver.backend) if one is not None]
    if not given or not all(map(callable, given)):
        raise ConfigError(
            f"no driver for {claim.scheme}://: {claim} names a Driver without the class of a broker"
            f" or result backend; {claim.remedy}"
        )
    return driver


def _claims() -> Iterator[Claim]:
    """Yield the entry points of the group in all distributions on the import path."""
    from importlib import metadata

    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            entries = [one for one in distribution.entry_points if one.group == GROUP]
        except Exception:  # broken metadata of any kind, of a package that may not concern us
            continue
        name, version = _named(distribution)
        # Of two distributions with one name, an import finds the first.
        known = re.sub(r"[-_.]+", "-", name).lower()
        if known in seen:
            continue
        seen.add(known)
        for entry in entries:
            yield Claim(entry.name.lower(), entry, name, version)


def _named(distribution: Distribution) -> tuple[str, str]:
    try:
        name, version = distribution.metadata["Name"], distribution.version
    except Exception:  # it has no metadata except its entry points
        name = version = ""
    return str(name or f"in {distribution.locate_file('')}"), str(version or "")


def _members(protocol: type) -> list[str]:
    names = {*vars(protocol), *protocol.__annotations__}
    return sorted(name for name in names if not name.startswith("_"))
