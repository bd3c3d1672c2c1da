"""A library over empty folders whose clock stands still, downloads from loopback, and a certificate for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.adapters.library import AdapterLibrary
from tests.adapters.file_hosts import make
from tests.adapters.libraries import LIMITS, Clock, open_library


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def library(root: Path, tmp_path: Path, clock: Clock) -> AdapterLibrary:
    return open_library(
        root, tmp_path / "data", LIMITS, downloads=tmp_path / "downloads", clock=clock, wall_clock=clock
    )


@pytest.fixture
def downloads(tmp_path: Path) -> AdapterDownloads:
    return make(tmp_path)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate and its key in one file, valid for three of the names; its authority beside it."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    authority = trustme.CA()
    issued = authority.issue_cert("huggingface.co", "other.huggingface.co", "cdn.example")
    issued.private_key_and_cert_chain_pem.write_to_path(file)
    authority.cert_pem.write_to_path(f"{file}.crt")
    return file
