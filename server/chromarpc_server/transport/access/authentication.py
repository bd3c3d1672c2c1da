"""Who calls: the middleware in front of every service but health, reflection included."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.x509.oid import ExtensionOID, NameOID
from grpc_health.v1 import health

from chromarpc_server.domain.callers import NOBODY, Caller, set_current_caller
from chromarpc_server.domain.errors import Unauthenticated
from chromarpc_server.domain.limits import CallerLimits
from chromarpc_server.transport.access.bad_tokens import BadTokens
from chromarpc_server.transport.access.callers_file import CallersFile, Proof, proof_of_token
from chromarpc_server.transport.access.interceptor import Call
from chromarpc_server.transport.access.peers import peer_address
from chromarpc_server.transport.access.revocation import Revocation

log = logging.getLogger(__name__)

OPEN_SERVICES = frozenset({health.SERVICE_NAME})
"""Probes carry no token, and learn nothing but whether requests are taken."""
CERTIFICATE_PREFIX = "certificate:"
"""Begins the names of callers that only their certificate names; names in a callers file hold no colon."""
LOG_FAILURES_EVERY_S = 10.0

_HEADER = "authorization"
_SCHEME = "bearer "
_MAX_HEADER = 4096
_MESSAGE = "this server wants to know who calls: send a token that it knows, as `authorization: Bearer …`"
_ALTERNATIVE_NAMES = ("peer_uri", "peer_dns")
"""Names in a certificate that name a caller, the most specific first."""


class Authentication:
    """Finds out who makes a call, or ends it."""

    def __init__(self, callers: CallersFile | None, *, certificates: bool, limits: CallerLimits) -> None:
        """Any of three servers: open to all, one that trusts certificates, one that knows its callers.

        Args:
            callers: who may call; None lets everyone who can connect.
            certificates: whether every connection has a verified client certificate.
            limits: of callers that no file names.
        """
        self._certificates = certificates
        self._limits = limits
        self._nobody = Caller(NOBODY.name, limits)
        self._bad_tokens = BadTokens()
        self._revocation = None if callers is None else Revocation(callers)
        self._unlogged = 0
        self._logged_at: float | None = None

    @asynccontextmanager
    async def middleware(self, call: Call) -> AsyncIterator[None]:
        """Sets the current caller.

        Raises:
            Unauthenticated: nobody that this server knows; the answer is the same whatever was wrong. Or somebody
                whom it knew when the call began.
            QuotaExceeded: nobody that it knows, too often.
        """
        if call.service in OPEN_SERVICES:
            yield
        elif self._revocation is None:
            set_current_caller(self._known(call, self._by_certificate(call.context)))
            yield
        else:
            proof = self._proof(call.context)
            caller = self._known(call, self._revocation.callers.find(proof))
            set_current_caller(caller)
            with self._revocation.of(call, caller, proof):
                yield

    def _known(self, call: Call, caller: Caller | None) -> Caller:
        if caller is None:
            self._log_failure(call)
            if _sends_token(call.context):
                self._bad_tokens.failed(peer_address(call.peer))
            raise Unauthenticated(_MESSAGE)
        return caller

    def _by_certificate(self, context: Any) -> Caller | None:
        """The caller, where no file names any."""
        if not self._certificates:
            return self._nobody
        identities = certificate_identities(context.auth_context())
        return Caller(CERTIFICATE_PREFIX + identities[0], self._limits) if identities else None

    def _proof(self, context: Any) -> Proof:
        """What the call proves its caller with, known or not: a token if it sends one, else its certificate."""
        headers = _headers(context)
        if not headers:
            return tuple(certificate_identities(context.auth_context())) if self._certificates else ()
        header = headers[0]
        if len(headers) > 1 or not isinstance(header, str) or len(header) > _MAX_HEADER:
            return ()
        if header[: len(_SCHEME)].lower() != _SCHEME:
            return ()
        return proof_of_token(header[len(_SCHEME) :].strip())

    def _log_failure(self, call: Call) -> None:
        """A line now and then, however many calls fail."""
        self._unlogged += 1
        now = time.monotonic()
        if self._logged_at is None or now - self._logged_at >= LOG_FAILURES_EVERY_S:
            fields = {"method": call.method, "peer": call.peer, "refused": self._unlogged}
            log.warning("rpc.unauthenticated", extra=fields)
            self._logged_at, self._unlogged = now, 0


def certificate_identities(auth_context: Mapping[str, Sequence[bytes]]) -> list[str]:
    """What a verified client certificate calls its owner: URIs (SPIFFE), then DNS names.

    The common name counts only in a certificate without any subjectAltName: beside one, of whatever kind, nobody
    need have vouched for it. A name that is not plain text names nobody.
    """
    found = [_text(value) for key in _ALTERNATIVE_NAMES for value in auth_context.get(key, ())]
    if not found and not auth_context.get("x509_subject_alternative_name"):
        found = [_lone_common_name(pem) for pem in list(auth_context.get("x509_pem_cert", ()))[:1]]
    return [name for name in found if name]


def _text(value: bytes) -> str:
    """A name's text; empty where it is none, so that no two certificates seem to hold the same one."""
    try:
        name = value.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return name if name.isprintable() else ""


def _headers(context: Any) -> list[str | bytes]:
    return [value for key, value in context.invocation_metadata() or () if key == _HEADER]


def _sends_token(context: Any) -> bool:
    """Whether a call says who makes it. A page asks before it has a token, to find out whether one is wanted."""
    return bool(_headers(context))


@lru_cache(maxsize=256)
def _lone_common_name(pem: bytes) -> str:
    """The common name of a certificate that has one of them and no subjectAltName; else, and in doubt, empty.

    gRPC gives alternative names only of the kinds that it knows, so the certificate itself is looked at.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        extensions = {extension.oid for extension in certificate.extensions}
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return ""
    if ExtensionOID.SUBJECT_ALTERNATIVE_NAME in extensions or len(names) != 1:
        return ""
    (name,) = names
    return _text(name.value if isinstance(name.value, bytes) else name.value.encode("utf-8"))
