"""Certificates for the servers: an authority of the tests, and certificates that it signed."""

from __future__ import annotations

from pathlib import Path

import trustme


class Certificates:
    """An authority, and a certificate of it for the loopback host, as files of PEM.

    Attributes:
        authority: The authority for clients to trust.
        certificate: Of the server, for ``localhost`` and ``127.0.0.1``.
        key: Of the server.
        stranger: Another authority, which signed nothing here.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        authority = trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        self.authority = folder / "authority.pem"
        self.certificate = folder / "server.pem"
        self.key = folder / "server.key"
        self.stranger = folder / "stranger.pem"
        authority.cert_pem.write_to_path(self.authority)
        issued.private_key_pem.write_to_path(self.key)
        # PostgreSQL accepts only a key that no other user may read.
        self.key.chmod(0o600)
        for number, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(self.certificate, append=number > 0)
        trustme.CA().cert_pem.write_to_path(self.stranger)
