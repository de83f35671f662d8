"""Service links: variables that Kubernetes and Docker set in a container, and that are no settings.

A service named ``aiotaskq`` or ``aiotaskq-redis`` gives every container beside it variables that
begin like those of settings, such as ``AIOTASKQ_PORT=tcp://10.0.0.1:6379``. Nobody has written
them, so they must not keep a program from starting.

A variable counts as a link only if its value has the form of a link too: ``AIOTASKQ_BROKER_PORT``
with the value 6379 is a mistake of somebody who takes it for a setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_HOST = r"[A-Za-z0-9._:\[\]-]+"  # an address, as a rule; one of IPv6 in brackets inside a URL
_NUMBER = r"[0-9]{1,5}"
_URL = rf"(tcp|udp|sctp)://{_HOST}:{_NUMBER}"
_PORT = r"_PORT_[0-9]{1,5}_(TCP|UDP|SCTP)"

# The ends of names, each with the form of the value.
_FORMS = tuple(
    (re.compile(f".+({name})"), re.compile(value))
    for name, value in (
        ("_SERVICE_HOST", _HOST),
        ("_SERVICE_PORT(_[A-Z0-9_]+)?", _NUMBER),
        (f"_PORT|{_PORT}", _URL),
        (f"{_PORT}_PROTO", "tcp|udp|sctp"),
        (f"{_PORT}_ADDR", _HOST),
        (f"{_PORT}_PORT", _NUMBER),
        # Of Docker alone: a range of ports, and the name of a link.
        (f"{_PORT}_(START|END)", _URL),
        (f"{_PORT}_PORT_(START|END)", _NUMBER),
        ("_NAME", "/[^/]+/[^/]+"),
    )
)
_OF_LINKED_CONTAINER = re.compile(r"(.+?)_ENV_.+", re.DOTALL)


def is_service_link(variable: str, environ: Mapping[str, str]) -> bool:
    """Return whether a variable, by its name and its value, is part of a service link.

    Docker also copies the variables of a linked container, with any names and values. They count if
    the name of that link is among the variables.
    """
    value = environ[variable].strip()
    if any(name.fullmatch(variable) and form.fullmatch(value) for name, form in _FORMS):
        return True
    copied = _OF_LINKED_CONTAINER.fullmatch(variable)
    if copied is None:
        return False
    link = f"{copied[1]}_NAME"
    return link in environ and is_service_link(link, environ)
