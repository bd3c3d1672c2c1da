"""Uploads and downloads are their owners': others cannot list, use, inspect or delete them, nor learn of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

import chromarpc
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.domain.callers import Caller
from chromarpc_server.domain.errors import (
    InvalidParameter,
    LoraNotFound,
    QuotaExceeded,
    UploadNotFound,
    UploadsFull,
)
from chromarpc_server.domain.limits import CallerLimits, UploadLimits
from tests.adapters.libraries import adapter_bytes, open_library, sha256_of
from tests.conftest import RunningServer
from tests.security.conftest import TOKENS

ALICE, BOB = Caller("alice"), Caller("bob")
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}


@pytest.fixture
def library(tmp_path: Path) -> AdapterLibrary:
    (tmp_path / "downloads").mkdir()
    limits = UploadLimits(max_file_bytes=8000, max_total_bytes=20_000, max_open=2, max_open_in_all=3)
    return open_library(None, tmp_path / "data", limits, downloads=tmp_path / "downloads")


def upload(library: AdapterLibrary, caller: Caller, data: bytes, filename: str = "a") -> str:
    state = library.uploads.create(filename, len(data), None, caller)
    library.uploads.append(state.upload_id, 0, data, caller.name)
    return library.uploads.finalize(state.upload_id, sha256_of(data), caller.name).path


def test_an_upload_does_not_exist_for_others(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    path = upload(library, ALICE, data)
    assert library.locate(path, "path", "alice").path.read_bytes() == data
    assert [lora.path for lora in library.listing("alice").loras] == [path]
    for stranger in ("bob", ""):
        assert library.listing(stranger).loras == ()
        assert library.find(sha256_of(data), stranger) is None
        assert library.hidden_from(stranger) == {sha256_of(data)}
        for call in (lambda who: library.locate(path, "path", who), lambda who: library.delete(path, who)):
            with pytest.raises(LoraNotFound) as theirs:
                call(stranger)
            library_answer = theirs.value.message
            with pytest.raises(LoraNotFound) as nobodys:
                open_library(None, Path("/nonexistent")).delete(path, stranger)
            assert library_answer in (nobodys.value.message, "the server has no adapter with this hash")
    assert library.hidden_from("alice") == frozenset()


def test_knowing_a_hash_gives_nobody_the_file_and_having_the_bytes_does(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    path = upload(library, ALICE, data, "alice's.safetensors")
    # Announcing the hash is answered as if nobody had it; only the bytes themselves make it bob's too.
    state = library.uploads.create("bob's.safetensors", len(data), sha256_of(data), BOB)
    assert state.next_offset == 0
    with pytest.raises(LoraNotFound):
        library.locate(path, "path", "bob")
    library.uploads.append(state.upload_id, 0, data, "bob")
    stored = library.uploads.finalize(state.upload_id, sha256_of(data), "bob")
    assert stored.filename == "bob's.safetensors"
    (alices,) = library.listing("alice").loras
    assert alices.filename == "alice's.safetensors"
    library.delete(path, "alice")
    assert library.listing("alice").loras == ()
    assert library.locate(path, "path", "bob").path.read_bytes() == data
    library.delete(path, "bob")
    with pytest.raises(LoraNotFound):
        library.locate(path, "path", "bob")
    assert library.find(sha256_of(data), "bob") is None


def test_an_upload_under_way_is_its_owner_s(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    state = library.uploads.create("a", len(data), None, ALICE)
    with pytest.raises(UploadNotFound):
        library.uploads.append(state.upload_id, 0, data, "bob")
    with pytest.raises(UploadNotFound):
        library.uploads.finalize(state.upload_id, sha256_of(data), "bob")
    library.uploads.append(state.upload_id, 0, data, "alice")
    library.uploads.finalize(state.upload_id, sha256_of(data), "alice")
    with pytest.raises(UploadNotFound):
        library.uploads.finalize(state.upload_id, sha256_of(data), "bob")


def test_a_download_is_theirs_who_fetched_it(library: AdapterLibrary, tmp_path: Path) -> None:
    data = adapter_bytes()
    path = f"sha256:{sha256_of(data)}"
    (tmp_path / "downloads" / f"{sha256_of(data)}.safetensors").write_bytes(data)
    library.add_download(sha256_of(data), "alice")
    assert library.locate(path, "path", "alice").path.read_bytes() == data
    with pytest.raises(LoraNotFound):
        library.locate(path, "path", "bob")
    with pytest.raises(InvalidParameter, match="a download cannot be deleted"):
        library.delete(path, "alice")
    with pytest.raises(LoraNotFound):
        library.delete(path, "bob")
    library.add_download(sha256_of(data), "bob")
    assert [lora.path for lora in library.listing("bob").loras] == [path]
    assert [lora.path for lora in library.listing("alice").loras] == [path]


def test_a_caller_s_bytes_are_counted_apart(library: AdapterLibrary) -> None:
    data = adapter_bytes()
    small = Caller("alice", CallerLimits(max_upload_bytes=len(data) + 100))
    upload(library, small, data)
    with pytest.raises(QuotaExceeded) as caught:
        library.uploads.create("b", 101, None, small)
    assert caught.value.metadata == {
        "subject": "caller",
        "quota": "max_upload_bytes",
        "limit": str(len(data) + 100),
    }
    library.uploads.create("b", 100, None, small)
    assert upload(library, BOB, data)


def test_a_caller_cannot_keep_others_from_uploading(library: AdapterLibrary) -> None:
    for _ in range(2):
        library.uploads.create("a", 10, None, ALICE)
    with pytest.raises(UploadsFull, match="you have 2"):
        library.uploads.create("a", 10, None, ALICE)
    library.uploads.create("a", 10, None, BOB)
    with pytest.raises(UploadsFull, match="the server has 3"):
        library.uploads.create("a", 10, None, BOB)


def test_through_the_server(serve: Callable[..., RunningServer], callers_file: Any, tmp_path: Path) -> None:
    import torch

    file = tmp_path / "mine.safetensors"
    name = "transformer.double_blocks.0.img_attn.proj"
    file.write_bytes(
        save({f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)})
    )
    server = serve(callers=callers_file())
    with (
        chromarpc.Client(server.target, token=TOKENS["alice"]) as alice,
        chromarpc.Client(server.target, token=TOKENS["bob"]) as bob,
    ):
        stored = alice.upload_lora(file)
        assert stored.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert [lora.path for lora in alice.list_loras()] == [stored.path]
        assert list(bob.list_loras()) == []
        with pytest.raises(chromarpc.LoraNotFound):
            bob.inspect_lora(stored.path, model="chroma-mini")
        with pytest.raises(chromarpc.LoraNotFound):
            bob.delete_lora(stored.path)
        with pytest.raises(chromarpc.LoraNotFound):
            bob.generate_images("a", loras=[stored.path], **SMALL)
        assert alice.generate_images("a", loras=[stored.path], **SMALL)
        assert any(model.resident_sets for model in alice.list_models())
        assert not any(resident.adapters for model in bob.list_models() for resident in model.resident_sets)
        # Bob has to send every byte, although the server has them.
        seen: list[int] = []
        assert bob.upload_lora(file, progress=lambda done, total: seen.append(done)).path == stored.path
        assert seen[-1] == file.stat().st_size
        alice.delete_lora(stored.path)
        assert bob.generate_images("a", loras=[stored.path], **SMALL)
