"""Files with certificates that a URL names: a check that they can be read.

A client library reads them whenever it connects. Its errors look like those of a server that is
away, so a wrong path would be waited for like an outage, for ever.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import TypeAlias

import msgspec

from aiotaskq.errors import ConfigError

NamedFile: TypeAlias = tuple[str, str]
"""The option that names a file, and its path."""


class CertificateFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The files that one URL names.

    Attributes:
        authorities: Files with certificates of authorities, or lists of revoked ones.
        folder: A folder with certificates of authorities.
        chain: A certificate of the client.
        key: Its key, where that is in another file.
        password: The password of the key.
    """

    authorities: tuple[NamedFile, ...] = ()
    folder: NamedFile | None = None
    chain: NamedFile | None = None
    key: NamedFile | None = None
    password: str = ""

    def __repr__(self) -> str:
        return "<CertificateFiles>"  # without the password

    async def check(self, url: str) -> None:
        """Read the files, in a thread.

        Args:
            url: The URL for people.

        Raises:
            ConfigError: One of them cannot be read, or holds something else.
        """
        if self != _NONE:
            await asyncio.to_thread(self._check, url)

    def _check(self, url: str) -> None:
        for one in self.authorities:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                context.load_verify_locations(cafile=one[1])
            except (OSError, ValueError) as error:
                raise _unreadable(url, one, error) from None
        if self.folder is not None:
            try:
                next(Path(self.folder[1]).iterdir(), None)
            except (OSError, ValueError) as error:
                raise _unreadable(url, self.folder, error) from None
        if self.key is not None:
            try:
                Path(self.key[1]).read_bytes()
            except (OSError, ValueError) as error:
                raise _unreadable(url, self.key, error) from None
        if self.chain is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                context.load_cert_chain(
                    self.chain[1],
                    None if self.key is None else self.key[1],
                    # A function: without, a key with a password would ask for it at the terminal.
                    password=lambda: self.password,
                )
            except (OSError, ValueError) as error:
                raise _unreadable(url, self.chain, error) from None


_NONE = CertificateFiles()


def _unreadable(url: str, named: NamedFile, error: Exception) -> ConfigError:
    option, path = named
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ConfigError(
        f"{url}: {option}={path} cannot be read: {reason}; correct the path, the rights or the"
        " contents of the file"
    )
