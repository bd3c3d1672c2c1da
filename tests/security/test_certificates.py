"""What a verified client certificate calls its owner: certificates of every shape, through real handshakes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

import chromarpc
from chromarpc.channel import TlsOptions
from chromarpc_server.transport.access.authentication import certificate_identities
from tests.conftest import RunningServer
from tests.security.conftest import Pems

Serve = Callable[..., RunningServer]
SUBJECT_ALTERNATIVE_NAME = x509.ObjectIdentifier("2.5.29.17")
DNS, URI = x509.DNSName, x509.UniformResourceIdentifier
OTHER = x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x05alice")
"""A user principal name, as Active Directory issues them."""
FOLDER = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "elsewhere")]))

Issue = Callable[..., TlsOptions]


def subject(*common_names: str) -> x509.Name:
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example")
    names = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names]
    return x509.Name([organisation, *names])


def certificate(authority: trustme.CA, names: x509.Name, *extensions: x509.ExtensionType) -> tuple[bytes, bytes]:
    """A client's certificate and its key, both PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    builder = x509.CertificateBuilder(
        issuer.subject, names, key.public_key(), 7, now - timedelta(days=1), now + timedelta(days=1)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    signing = load_pem_private_key(authority.private_key_pem.bytes(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    signed = builder.sign(signing, hashes.SHA256())
    return signed.public_bytes(Encoding.PEM), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.fixture
def issue(authority: trustme.CA, pems: Pems, tmp_path: Path) -> Issue:
    def make(names: x509.Name, *extensions: x509.ExtensionType) -> TlsOptions:
        issued, key = certificate(authority, names, *extensions)
        (tmp_path / "made.pem").write_bytes(issued)
        (tmp_path / "made.key").write_bytes(key)
        return TlsOptions(pems.ca, tmp_path / "made.pem", tmp_path / "made.key")

    return make


def caller(target: str, tls: TlsOptions) -> str | None:
    """Whom the server takes the holder of a certificate for; None where it knows nobody."""
    with chromarpc.Client(target, tls=tls) as client:
        try:
            return client.server_info().caller
        except chromarpc.AccessDenied:
            return None


@pytest.fixture
def renderer_server(serve: Serve, pems: Pems, tmp_path: Path) -> RunningServer:
    """Knows `renderer` by its certificate's name."""
    known = tmp_path / "known.toml"
    known.write_text('[[callers]]\nname = "renderer"\ncertificate = "renderer.example"\n')
    return serve(tls_cert=pems.cert, tls_key=pems.key, tls_client_ca=pems.ca, callers=known)


NO_RENDERER: list[Sequence[x509.GeneralName]] = [
    [DNS("intern.example")],
    [URI("spiffe://example/intern")],
    [x509.RFC822Name("intern@example.org")],
    [x509.IPAddress(ip_address("192.0.2.7"))],
    [x509.RegisteredID(x509.ObjectIdentifier("1.2.3.4"))],
    [OTHER],
    [FOLDER],
    [],
    [DNS("*.example")],
    [DNS("RENDERER.example")],
    [DNS("renderer.example.org")],
]


@pytest.mark.parametrize("names", NO_RENDERER, ids=repr)
def test_a_common_name_beside_an_alternative_name_lets_nobody_in(
    renderer_server: RunningServer, issue: Issue, names: Sequence[x509.GeneralName]
) -> None:
    tls = issue(subject("renderer.example"), x509.SubjectAlternativeName(names))
    assert caller(renderer_server.target, tls) is None


@pytest.mark.parametrize(
    "names",
    [
        [DNS("renderer.example")],
        [URI("renderer.example")],
        [DNS("first.example"), DNS("renderer.example")],
        [URI("spiffe://example/a"), OTHER, DNS("renderer.example")],
    ],
    ids=repr,
)
def test_any_uri_or_dns_name_of_a_certificate_finds_its_entry(
    renderer_server: RunningServer, issue: Issue, names: Sequence[x509.GeneralName]
) -> None:
    tls = issue(subject("somebody else"), x509.SubjectAlternativeName(names))
    assert caller(renderer_server.target, tls) == "renderer"


def test_a_lone_common_name_counts_and_one_of_several_does_not(
    renderer_server: RunningServer, issue: Issue
) -> None:
    assert caller(renderer_server.target, issue(subject("renderer.example"))) == "renderer"
    usage = x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH])
    assert caller(renderer_server.target, issue(subject("renderer.example"), usage)) == "renderer"
    assert caller(renderer_server.target, issue(subject("renderer.example", "intern.example"))) is None
    assert caller(renderer_server.target, issue(subject())) is None


def test_the_first_uri_names_a_caller_then_the_first_dns_name(serve: Serve, pems: Pems, issue: Issue) -> None:
    target = serve(tls_cert=pems.cert, tls_key=pems.key, tls_client_ca=pems.ca).target
    for names, expected in (
        ([DNS("b.example"), DNS("a.example"), URI("spiffe://x/2"), URI("spiffe://x/1")], "spiffe://x/2"),
        ([OTHER, DNS("b.example"), DNS("a.example")], "b.example"),
    ):
        tls = issue(subject("renderer"), x509.SubjectAlternativeName(names))
        assert caller(target, tls) == f"certificate:{expected}"
    assert caller(target, issue(subject("renderer"))) == "certificate:renderer"
    assert caller(target, issue(subject("renderer"), x509.SubjectAlternativeName([OTHER]))) is None


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\u202eb", "\x7f"])
def test_a_name_that_is_not_plain_text_names_nobody(authority: trustme.CA, name: str) -> None:
    pem, _ = certificate(authority, subject(name))
    shown = {"x509_common_name": [name.encode()], "x509_pem_cert": [pem]}
    assert certificate_identities(shown) == []
    assert certificate_identities({"peer_uri": [name.encode()], "peer_dns": [b"a.example"]}) == ["a.example"]


def test_two_names_that_cannot_be_read_are_not_the_same_name() -> None:
    assert certificate_identities({"peer_uri": [b"spiffe://x/\xff"], "peer_dns": [b"\xfe"]}) == []


def test_a_certificate_that_cannot_be_looked_at_names_nobody_by_its_common_name(authority: trustme.CA) -> None:
    garbled = x509.UnrecognizedExtension(SUBJECT_ALTERNATIVE_NAME, b"\x30\x03\xa3\x01\x00")
    pem, _ = certificate(authority, subject("renderer"), garbled)
    for pems in ([pem], [], [b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"]):
        assert certificate_identities({"x509_common_name": [b"renderer"], "x509_pem_cert": pems}) == []
