"""Damaged adapters through the real client and a real server: refused by name, healed by the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from chromarpc import Client
from chromarpc_server.transport.access.callers_file import entry_text
from tests.adapters.libraries import flip_a_bit
from tests.conftest import RunningServer
from tests.integration.loras.recorded import RECORDED, SMALL, sha256_of

Serve = Callable[..., RunningServer]
FILE = RECORDED / "aitk.safetensors"
SHA256 = sha256_of(FILE)
PATH = f"sha256:{SHA256}"
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 100}


@pytest.fixture
def uploaded(tmp_path: Path) -> Path:
    """Where the upload lies once it was made."""
    return tmp_path / "data" / "loras" / f"{SHA256}.safetensors"


def drawn(client: Client) -> str:
    """The hash of the image that the adapter gives."""
    (image,) = client.generate_images("a", loras=[PATH], **SMALL)
    return image.sha256


def require_damage(error: chromarpc.LoraDamaged, field: str) -> None:
    assert error.reason == "LORA_DAMAGED"
    assert [violation.field for violation in error.violations] == [field]
    assert error.metadata["sha256"] == SHA256
    assert SHA256 in error.message


def test_a_damaged_upload_is_refused_by_name_until_it_is_uploaded_again(serve: Serve, uploaded: Path) -> None:
    server = serve()
    with Client(server.target) as client:
        client.upload_lora(FILE)
        before = drawn(client)
        server.stop()
    flip_a_bit(uploaded)
    with Client(serve().target) as client:
        with pytest.raises(chromarpc.LoraDamaged) as caught:
            drawn(client)
        require_damage(caught.value, "loras.0.path")
        job = client.create_job("a", loras=[PATH], **SMALL)
        with pytest.raises(chromarpc.LoraDamaged) as caught:
            list(client.watch_job(job.job_id))
        require_damage(caught.value, "loras.0.path")
        with pytest.raises(chromarpc.LoraDamaged) as caught:
            client.inspect_lora(PATH, model="chroma-mini")
        require_damage(caught.value, "path")
        sent: list[int] = []
        assert client.upload_lora(FILE, progress=lambda done, _: sent.append(done)).path == PATH
        assert sent[0] == 0
        assert drawn(client) == before
        assert client.inspect_lora(PATH, model="chroma-mini").sha256 == SHA256
    assert sha256_of(uploaded) == SHA256


def test_a_job_that_waits_draws_with_what_was_healed_meanwhile_across_a_restart_too(
    serve: Serve, uploaded: Path
) -> None:
    server = serve()
    with Client(server.target) as client:
        client.upload_lora(FILE)
        before = drawn(client)
        blocker = client.create_job("a", **LONG)
        waiting = client.create_job("a", loras=[PATH], **SMALL)
        server.stop()
    flip_a_bit(uploaded)
    with Client(serve().target) as client:
        client.upload_lora(FILE)
        client.cancel_job(blocker.job_id)
        *_, end = client.watch_job(waiting.job_id)
        assert isinstance(end, chromarpc.Completed)
        assert client.get_image_bytes(waiting.job_id)
        assert client.get_job(waiting.job_id).images[0].sha256 == before


def test_an_upload_whose_note_of_owners_is_damaged_is_nobodys_until_its_bytes_come_again(
    serve: Serve, uploaded: Path, tmp_path: Path
) -> None:
    tokens = {name: f"chromarpc_{name}" for name in ("alice", "bob")}
    callers = tmp_path / "callers.toml"
    callers.write_text("".join(entry_text(name, token) for name, token in tokens.items()))
    server = serve(callers=callers)
    with Client(server.target, token=tokens["alice"]) as alice, Client(server.target, token=tokens["bob"]) as bob:
        alice.upload_lora(FILE)
        note = uploaded.with_suffix(".json")
        note.write_text(note.read_text().replace("alice", "bob"))
        for client in (alice, bob):
            assert list(client.list_loras()) == []
            with pytest.raises(chromarpc.LoraNotFound):
                drawn(client)
        server.stop()
    with Client(serve().target) as anybody:
        assert list(anybody.list_loras()) == []
        with pytest.raises(chromarpc.LoraNotFound):
            drawn(anybody)
    server = serve(callers=callers)
    with Client(server.target, token=tokens["alice"]) as alice, Client(server.target, token=tokens["bob"]) as bob:
        alice.upload_lora(FILE)
        assert [lora.path for lora in alice.list_loras()] == [PATH]
        assert list(bob.list_loras()) == []
        assert drawn(alice)
