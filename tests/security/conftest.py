"""Certificates, and a callers file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

TOKENS = {"alice": "chromarpc_alice-" + "a" * 40, "bob": "chromarpc_bob-" + "b" * 40}


@dataclass(frozen=True)
class Pems:
    """PEM files of a server and a client, and of their authority."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path


def issue(authority: trustme.CA, folder: Path, name: str, *names: str, common_name: str | None = None) -> None:
    issued = authority.issue_cert(*names, common_name=common_name)
    folder.mkdir(parents=True, exist_ok=True)
    issued.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def pems(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Pems:
    folder = tmp_path_factory.mktemp("pki")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issue(authority, folder, "server", "localhost", "127.0.0.1")
    issue(authority, folder, "client", "renderer.example", common_name="renderer")
    return Pems(
        folder / "ca.pem",
        folder / "server.pem",
        folder / "server.key",
        folder / "client.pem",
        folder / "client.key",
    )


def sha256_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def entry(name: str, token: str, more: str = "") -> str:
    return f'[[callers]]\nname = "{name}"\ntoken_sha256 = "{sha256_of(token)}"\n{more}\n'


@pytest.fixture
def callers_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file that knows alice and bob, with further lines for each."""

    def write(**more: str) -> Path:
        path = tmp_path / "callers.toml"
        path.write_text("".join(entry(name, token, more.get(name, "")) for name, token in TOKENS.items()))
        return path

    return write
