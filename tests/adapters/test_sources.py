"""Adapters whose content the request pins, found and fetched: another content never gets to the device."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from chromarpc_server.adapters.downloads.cache import Downloaded
from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.adapters.sources import AdapterSources, FoundAdapters
from chromarpc_server.domain.callers import NOBODY
from chromarpc_server.domain.errors import InvalidParameter, LoraContentChanged
from chromarpc_server.domain.plan import PlannedLora
from chromarpc_server.domain.requests import GenerationRequest, LoraRequest, PromptRequest
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.jobs.recovery import recover_adapters
from chromarpc_server.jobs.store.stored_jobs import StoredRequest
from tests.adapters.libraries import open_library

CONTENT = save({"diffusion_model.img_in.lora_A.weight": torch.zeros(1, 1)})
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = "ab" * 32
URL = "https://example.org/a.safetensors"


@pytest.fixture
def library(tmp_path: Path) -> AdapterLibrary:
    (tmp_path / "root").mkdir()
    (tmp_path / "data" / "downloads").mkdir(parents=True)
    (tmp_path / "root" / "a.safetensors").write_bytes(CONTENT)
    return open_library(tmp_path / "root", tmp_path / "data")


class Downloads:
    """Has fetched everything already."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.leases: dict[object, str] = {}

    async def fetch(self, url: str, **_: Any) -> Downloaded:
        download = Downloaded(self.file, SHA256, len(CONTENT), self.leases)
        self.leases[download] = url
        return download

    def require_fetchable(self, url: str, field: str) -> None:
        pass


def _find(library: AdapterLibrary, *loras: PlannedLora, first: int = 0) -> FoundAdapters:
    return asyncio.run(AdapterSources(library, None).find(loras, first=first))


def _blamed(error: LoraContentChanged) -> Sequence[str]:
    assert error.metadata == {"sha256_expected": OTHER, "sha256_now": SHA256}
    return [violation.field for violation in error.violations]


def test_a_file_that_is_named_by_another_hash_than_expected_is_refused_at_once(library: AdapterLibrary) -> None:
    named = PlannedLora(f"sha256:{SHA256}", 1.0)
    assert _find(library, named, PlannedLora(f"sha256:{SHA256}", 1.0, SHA256)).complete
    with pytest.raises(LoraContentChanged) as caught:
        _find(library, named, PlannedLora(f"sha256:{SHA256}", 1.0, OTHER))
    assert _blamed(caught.value) == ["loras.1.expected_sha256"]


def test_a_file_below_the_root_is_refused_at_once_where_its_hash_is_known(library: AdapterLibrary) -> None:
    pinned = PlannedLora("a.safetensors", 1.0, OTHER)
    (file,) = _find(library, pinned).complete  # nobody has read it, and nobody is made to
    library.learn(file, SHA256)
    with pytest.raises(LoraContentChanged) as caught:
        _find(library, pinned, first=2)
    assert _blamed(caught.value) == ["loras.2.expected_sha256"]
    assert _find(library, PlannedLora("a.safetensors", 1.0, SHA256)).complete == (file,)


def test_a_file_that_was_written_anew_is_judged_anew(library: AdapterLibrary, tmp_path: Path) -> None:
    pinned = PlannedLora("a.safetensors", 1.0, OTHER)
    library.learn(_find(library, pinned).complete[0], SHA256)
    (tmp_path / "root" / "a.safetensors").write_bytes(CONTENT * 2)
    assert _find(library, pinned).complete


def test_a_download_of_other_content_ends_the_job_and_is_let_go(library: AdapterLibrary, tmp_path: Path) -> None:
    downloads: Any = Downloads(tmp_path / "root" / "a.safetensors")
    sources = AdapterSources(library, downloads)

    async def fetch(expected: str) -> FoundAdapters:
        loras = [PlannedLora(URL, 1.0, expected)]
        return await sources.fetch(loras, await sources.find(loras), token=None, emit=lambda _: None)

    fetched = asyncio.run(fetch(SHA256))
    assert fetched.complete == (AdapterFile.of(downloads.file, "", sha256=SHA256),)
    fetched.release()
    with pytest.raises(LoraContentChanged) as caught:
        asyncio.run(fetch(OTHER))
    assert _blamed(caught.value) == ["loras.0.expected_sha256"]
    assert downloads.leases == {}


def test_an_adapter_that_is_not_found_again_after_a_restart_is_blamed_by_its_own_place(
    library: AdapterLibrary,
) -> None:
    request = GenerationRequest(
        model="chroma", prompts=(PromptRequest("a"),), loras=(LoraRequest("a.safetensors"), LoraRequest(URL))
    )
    stored = StoredRequest(
        owner=NOBODY.name,
        plan=resolve(request, Serving()),
        has_prompts=True,
        needs_token=False,
        adapters=(None, None),
    )
    fetches_nothing = AdapterSources(library, None)
    with pytest.raises(InvalidParameter) as caught:
        asyncio.run(recover_adapters(stored, fetches_nothing))
    assert [violation.field for violation in caught.value.violations] == ["loras.1.path"]
