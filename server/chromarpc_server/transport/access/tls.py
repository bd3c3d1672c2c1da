"""TLS from files, read again when they change, so that certificates can be renewed without a restart."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a server's TLS."""

    certificate: Path
    """The server's certificate, with the chain up to its authority."""
    private_key: Path
    """Its key, without a passphrase."""
    client_authorities: Path | None = None
    """Authorities whose certificates clients must have; None asks clients for none."""

    def read(self) -> Any:
        """The files' contents, checked: the key is the certificate's, the authorities can be read.

        Raises:
            ValueError: naming the file at fault.
        """
        certificate, key = _bytes_of(self.certificate), _bytes_of(self.private_key)
        authorities = None if self.client_authorities is None else _bytes_of(self.client_authorities)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.private_key, password=_no_passphrase)
        except ssl.SSLError as error:
            raise ValueError(self._problem(error)) from None
        if self.client_authorities is not None:
            try:
                context.load_verify_locations(self.client_authorities)
            except ssl.SSLError:
                raise ValueError(f"{self.client_authorities}: holds no PEM certificate") from None
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authorities)

    def _problem(self, error: ssl.SSLError) -> str:
        if error.reason == "KEY_VALUES_MISMATCH":
            return f"{self.private_key} is not the key of the certificate in {self.certificate}"
        for path, kind in ((self.certificate, "certificate"), (self.private_key, "private key")):
            if f"{kind.upper()}-----".encode() not in _bytes_of(path):
                return f"{path}: holds no PEM {kind}"
        return f"{self.certificate} and {self.private_key} cannot be used together: {error.reason or 'damaged'}"

    def stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Changes when a file does."""
        return tuple(
            _stamp(path)
            for path in (self.certificate, self.private_key, self.client_authorities)
            if path is not None
        )


class ServerTls:
    """Credentials that follow their files: connections made after a change are served the new certificate."""

    def __init__(self, files: TlsFiles) -> None:
        """Reads the files.

        Raises:
            ValueError: naming the file at fault.
        """
        self._files = files
        self._stamp = files.stamp()
        self._first = files.read()
        self._looked_at = time.monotonic()
        self._lock = threading.Lock()

    @property
    def wants_client_certificates(self) -> bool:
        """Whether every connection has a verified client certificate."""
        return self._files.client_authorities is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._first, self._renewed, require_client_authentication=self.wants_client_certificates
        )
        return credentials

    def _renewed(self) -> Any:
        """What changed, None for nothing; gRPC asks before each handshake, on threads of its own."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked_at < LOOK_EVERY_S:
                return None
            self._looked_at = now
            stamp = self._files.stamp()
            if stamp == self._stamp:
                return None
            try:
                renewed = self._files.read()
            except ValueError as error:
                # Files are rarely replaced at one stroke: the next connection looks again.
                log.warning("tls.not_reloaded", extra={"problem": str(error)})
                return None
            self._stamp = stamp
            log.info("tls.reloaded")
            return renewed


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - follows the links that Kubernetes swaps
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _no_passphrase() -> str:
    raise ValueError("the private key is encrypted; the server cannot ask for a passphrase")
