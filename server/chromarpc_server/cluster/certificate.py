"""TLS between server and actors: a certificate made anew by each server process, which its actors alone trust."""

from __future__ import annotations

import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAME = "chromarpc-server"
"""In the certificate; which address it is reached at is a matter of the network."""
_VALID = timedelta(days=3650)


def make_server_tls() -> tuple[ssl.SSLContext, str]:
    """The server's end, and what its actors trust, as PEM. The key leaves the memory for a moment only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Hosts' clocks may be behind.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory() as folder:  # for this user alone; ssl reads keys from files only
        file = Path(folder) / "both.pem"
        file.touch(mode=0o600)
        file.write_bytes(secret + pem)
        context.load_cert_chain(file)
    return context, pem.decode()


def make_actor_tls(trusted: str) -> ssl.SSLContext:
    """An actor's end; `trusted`: PEM."""
    context = ssl.create_default_context(cadata=trusted)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
