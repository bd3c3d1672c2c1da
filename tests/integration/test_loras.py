"""Adapters that are listed, inspected, uploaded and deleted through the real client and a real server."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import chromarpc
from chromarpc import AsyncClient, Client, HealthStatus
from chromarpc import upload as client_upload
from chromarpc.cli import app
from chromarpc.errors import from_status
from chromarpc.v1 import lora_service_pb2, lora_service_pb2_grpc
from chromarpc_server.adapters.uploads.registry import UploadRegistry, UploadState
from chromarpc_server.domain.errors import Draining
from chromarpc_server.settings import ServerSettings
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

RECORDED = GOLDENS / "adapters"
FORMATS = sorted(path.stem for path in RECORDED.glob("*.safetensors") if ".expected" not in path.name)
SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 2,
    "guidance_scale": 1.0,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def library_server(serve: Callable[..., RunningServer], root: Path) -> RunningServer:
    """A server with an empty adapter root and no uploads, whose `chroma` is the tiny model."""
    return serve(lora_root=root, alias={"chroma": "chroma-mini"})


@pytest.fixture
def client(library_server: RunningServer) -> Iterator[Client]:
    with Client(library_server.target, timeout_s=60) as client:
        yield client


@pytest.fixture
def stub(library_server: RunningServer) -> Iterator[lora_service_pb2_grpc.LoraServiceStub]:
    with grpc.insecure_channel(library_server.target) as channel:
        yield lora_service_pb2_grpc.LoraServiceStub(channel)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_upload, "RETRY_DELAYS_S", (0.0, 0.0))


def refused(call: Callable[[], object]) -> chromarpc.StatusError:
    """The error of a bare stub's call, as the client would raise it."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return from_status(error.code(), error.details(), error.trailing_metadata(), target="")


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_service_is_healthy(library_server: RunningServer) -> None:
    with Client(library_server.target) as client:
        assert client.health("chromarpc.v1.LoraService") is HealthStatus.SERVING


def test_an_uploaded_adapter_draws_what_the_same_file_below_the_root_draws(client: Client, root: Path) -> None:
    shutil.copy(RECORDED / "aitk.safetensors", root)
    uploaded = client.upload_lora(RECORDED / "aitk.safetensors")
    assert uploaded.path == f"sha256:{sha256_of(RECORDED / 'aitk.safetensors')}"
    bare, below_root, by_hash = (
        # Without their records, which name the adapter as it was asked for.
        client.generate_images("a", loras=loras, picture_record=False, **SMALL)[0]
        for loras in ([], ["aitk.safetensors"], [uploaded.path])
    )
    assert by_hash.sha256 == below_root.sha256 != bare.sha256
    assert by_hash.prepared is not None
    assert by_hash.prepared.adapters[0].sha256 == uploaded.sha256


def test_what_was_uploaded_is_listed_and_not_sent_again(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    lora = client.upload_lora(RECORDED / "kohya.safetensors", progress=lambda *step: told.append(step))
    size = (RECORDED / "kohya.safetensors").stat().st_size
    assert (told[0], told[-1]) == ((0, size), (size, size))
    assert tuple(client.list_loras()) == (lora,)
    assert (lora.filename, lora.source, lora.size_bytes) == (
        "kohya.safetensors", chromarpc.LoraSource.UPLOAD, size,
    )  # fmt: skip
    monkeypatch.delattr(UploadRegistry, "append")
    assert client.upload_lora(RECORDED / "kohya.safetensors", filename="again") == lora
    assert sorted(path.name for path in (tmp_path / "data" / "loras").iterdir()) == [
        f"{lora.sha256}.json",
        f"{lora.sha256}.safetensors",
    ]


def test_what_was_only_downloaded_is_uploaded_all_the_same(client: Client, tmp_path: Path) -> None:
    sha256 = sha256_of(RECORDED / "aitk.safetensors")
    (tmp_path / "data" / "downloads").mkdir(parents=True, exist_ok=True)
    downloaded = tmp_path / "data" / "downloads" / f"{sha256}.safetensors"
    shutil.copy(RECORDED / "aitk.safetensors", downloaded)
    assert [lora.source for lora in client.list_loras()] == [chromarpc.LoraSource.DOWNLOAD]
    with pytest.raises(chromarpc.InvalidRequest, match="only uploads can"):
        client.delete_lora(f"sha256:{sha256}")
    assert client.upload_lora(RECORDED / "aitk.safetensors").source is chromarpc.LoraSource.UPLOAD
    downloaded.unlink()
    assert client.inspect_lora(f"sha256:{sha256}").sha256 == sha256


async def test_the_async_client_does_the_same(library_server: RunningServer, root: Path) -> None:
    shutil.copy(RECORDED / "aitk.safetensors", root)
    async with AsyncClient(library_server.target, timeout_s=60) as client:
        lora = await client.upload_lora(RECORDED / "kohya.safetensors")
        listed = await client.list_loras()
        assert [entry.path for entry in listed] == ["aitk.safetensors", lora.path]
        assert not listed.truncated
        assert (await client.inspect_lora(lora.path)).sha256 == lora.sha256
        await client.delete_lora(lora.path)
        assert len(await client.list_loras()) == 1
        with pytest.raises(chromarpc.LoraNotFound):
            await client.delete_lora(lora.path)
        with pytest.raises(chromarpc.LoraInvalid):
            await client.upload_lora(Path(__file__))


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("is_lost_before", [True, False], ids=["the chunk is lost", "its answer is lost"])
def test_an_upload_goes_on_after_a_break(
    client: Client, monkeypatch: pytest.MonkeyPatch, is_lost_before: bool
) -> None:
    monkeypatch.setattr(client_upload, "CHUNK_BYTES", 1000)
    take = UploadRegistry.append
    calls: list[int] = []

    def break_once(self: UploadRegistry, upload_id: str, offset: int, chunk: bytes, *owner: str) -> UploadState:
        calls.append(offset)
        if len(calls) != 3:
            return take(self, upload_id, offset, chunk, *owner)
        if not is_lost_before:
            take(self, upload_id, offset, chunk, *owner)
        raise Draining("broken off")

    monkeypatch.setattr(UploadRegistry, "append", break_once)
    lora = client.upload_lora(RECORDED / "loha.safetensors")
    assert calls[:5] == [0, 1000, 2000, 2000, 3000]
    assert lora.sha256 == sha256_of(RECORDED / "loha.safetensors")


@pytest.mark.usefixtures("quick_retries")
def test_an_upload_goes_on_where_the_server_says(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that arrives twice while the client knows of neither leaves the two apart."""
    monkeypatch.setattr(client_upload, "CHUNK_BYTES", 1000)
    take = UploadRegistry.append
    content = (RECORDED / "loha.safetensors").read_bytes()
    calls: list[int] = []

    def run_ahead(self: UploadRegistry, upload_id: str, offset: int, chunk: bytes, *owner: str) -> UploadState:
        calls.append(offset)
        if len(calls) == 2:
            take(self, upload_id, 1000, content[1000:1500])
        return take(self, upload_id, offset, chunk, *owner)

    monkeypatch.setattr(UploadRegistry, "append", run_ahead)
    assert client.upload_lora(RECORDED / "loha.safetensors").size_bytes == len(content)
    assert calls[:4] == [0, 1000, 1500, 2500]


@pytest.mark.usefixtures("quick_retries")
def test_a_server_that_stays_away_ends_the_upload(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def gone(self: UploadRegistry, upload_id: str, offset: int, chunk: bytes, *owner: str) -> UploadState:
        calls.append(offset)
        raise Draining("gone")

    monkeypatch.setattr(UploadRegistry, "append", gone)
    with pytest.raises(chromarpc.Draining):
        client.upload_lora(RECORDED / "loha.safetensors")
    assert calls == [0, 0, 0]


def _garbage(folder: Path) -> Iterator[Path]:
    whole = (RECORDED / "aitk.safetensors").read_bytes()
    contents = {
        "noise": bytes(range(256)) * 4,
        "pickle": pickle.dumps({"state_dict": [0.0] * 100}),
        "truncated": whole[:-7],
        "longer": whole + b"\0",
        "html": b"<!doctype html><title>404</title>",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name
    with zipfile.ZipFile(folder / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    yield folder / "zip"


def test_what_is_no_adapter_is_refused_and_leaves_nothing(client: Client, tmp_path: Path) -> None:
    for file in _garbage(tmp_path):
        with pytest.raises(chromarpc.LoraInvalid, match="the file cannot be used") as caught:
            client.upload_lora(file)
        assert str(tmp_path) not in str(caught.value)
    assert len(client.list_loras()) == 0
    assert list((tmp_path / "data" / "loras").iterdir()) == []
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


def test_limits_are_told_before_any_byte_is_sent(serve: Callable[..., RunningServer]) -> None:
    with Client(serve(max_upload_bytes=1000).target) as client:
        with pytest.raises(chromarpc.InvalidRequest) as caught:
            client.upload_lora(RECORDED / "aitk.safetensors")
        assert [violation.field for violation in caught.value.violations] == ["size_bytes"]
    with (
        Client(serve(max_uploads_bytes=1000).target) as client,
        pytest.raises(chromarpc.UploadsFull),
    ):
        client.upload_lora(RECORDED / "aitk.safetensors")


def test_chunks_shrink_with_what_a_message_may_hold(serve: Callable[..., RunningServer]) -> None:
    with Client(serve(limits={"max_request_bytes": 2048}).target) as client:
        assert client.upload_lora(RECORDED / "aitk.safetensors").size_bytes > 2048


def test_errors_of_an_upload_name_what_is_wrong(stub: lora_service_pb2_grpc.LoraServiceStub) -> None:
    created = stub.CreateLoraUpload(lora_service_pb2.CreateLoraUploadRequest(filename="a", size_bytes=3000))

    def append(offset: int, chunk: bytes, upload_id: str = created.upload_id) -> Any:
        return stub.AppendLoraUpload(
            lora_service_pb2.AppendLoraUploadRequest(upload_id=upload_id, offset=offset, chunk=chunk)
        )

    def finalize(sha256: str) -> Any:
        return stub.FinalizeLoraUpload(
            lora_service_pb2.FinalizeLoraUploadRequest(upload_id=created.upload_id, sha256=sha256)
        )

    assert append(0, b"x" * 1000).next_offset == 1000
    assert append(0, b"x" * 1000).next_offset == 1000
    error = refused(lambda: append(2000, b"x"))
    assert isinstance(error, chromarpc.UploadOutOfOrder)
    assert (error.metadata["expected_offset"], error.violations[0].field) == ("1000", "offset")
    assert isinstance(refused(lambda: append(0, b"x", "another")), chromarpc.UploadNotFound)
    assert refused(lambda: append(1000, b"x" * 2001)).violations[0].field == "chunk"
    assert refused(lambda: append(1000, b"")).violations[0].field == "chunk"
    assert refused(lambda: finalize("nonsense")).violations[0].field == "sha256"
    assert isinstance(refused(lambda: finalize("0" * 64)), chromarpc.UploadOutOfOrder)
    assert append(1000, b"x" * 2000).next_offset == 3000
    error = refused(lambda: finalize("0" * 64))
    assert isinstance(error, chromarpc.LoraInvalid)
    assert error.violations[0].field == "sha256"
    assert isinstance(refused(lambda: append(0, b"x")), chromarpc.UploadNotFound)


def test_only_uploads_can_be_deleted(client: Client, root: Path) -> None:
    shutil.copy(RECORDED / "aitk.safetensors", root)
    uploaded = client.upload_lora(RECORDED / "kohya.safetensors")
    client.delete_lora(uploaded.path)
    with pytest.raises(chromarpc.LoraNotFound):
        client.generate_images("a", loras=uploaded.path, **SMALL)
    for path in ("aitk.safetensors", "../root/aitk.safetensors", ""):
        with pytest.raises(chromarpc.InvalidRequest) as caught:
            client.delete_lora(path)
        assert caught.value.violations[0].field == "path"
    assert (root / "aitk.safetensors").exists()


def test_the_list_comes_in_pages(stub: lora_service_pb2_grpc.LoraServiceStub, client: Client, root: Path) -> None:
    for name in "cabed":
        (root / f"{name}.safetensors").write_bytes(b"anything")
    uploaded = client.upload_lora(RECORDED / "aitk.safetensors")
    pages: list[list[str]] = []
    token = ""
    while token or not pages:
        page = stub.ListLoras(lora_service_pb2.ListLorasRequest(page_size=2, page_token=token))
        pages.append([lora.path for lora in page.loras])
        token = page.next_page_token
        (root / "c.safetensors").unlink(missing_ok=True)
    assert pages == [
        ["a.safetensors", "b.safetensors"],
        ["d.safetensors", "e.safetensors"],
        [uploaded.path],
    ]
    for request, field in (
        (lora_service_pb2.ListLorasRequest(page_size=-1), "page_size"),
        (lora_service_pb2.ListLorasRequest(page_size=1001), "page_size"),
        *(
            (lora_service_pb2.ListLorasRequest(page_token=token), "page_token")
            for token in ("x", "ä", "WzFd", "e30=", "W1tdLCAxXQ==")
        ),
    ):
        error = refused(lambda request=request: stub.ListLoras(request))
        assert [violation.field for violation in error.violations] == [field]


@pytest.mark.parametrize("name", FORMATS)
def test_every_recorded_format_is_inspected(client: Client, root: Path, name: str) -> None:
    """Norms are compared with the recorded weights: what was really added, block by block."""
    shutil.copy(RECORDED / f"{name}.safetensors", root)
    found = client.inspect_lora(f"{name}.safetensors")
    assert (found.model, found.sha256) == ("chroma-mini", sha256_of(RECORDED / f"{name}.safetensors"))
    assert found.dtypes == ("F32",)
    assert found.unmatched_key_count == 0
    assert found.warnings == ()

    before = load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors")
    expected = RECORDED / f"{name}.expected.safetensors"
    with safe_open(expected, "pt") as file:
        strength = float(file.metadata()["strength"])
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    weights: dict[str, float] = {}
    for parameter, after in load_file(expected).items():
        block = re.sub(r"(\.\d+)\..*|\.linear\.weight", r"\1", parameter)
        added = (after.double() - before[parameter].double()) / strength
        squares[block] = squares.get(block, 0.0) + float(added.square().sum())
        weights[block] = weights.get(block, 0.0) + float(before[parameter].double().square().sum())
        counts[block] = counts.get(block, 0) + int((added.abs().sum(-1) != 0).sum()) * added.shape[-1]
    assert [block.block for block in found.blocks] == sorted(squares)
    for block in found.blocks:
        if block.has_magnitude:
            assert name == "kohya_dora"
        else:
            assert block.norm == pytest.approx(squares[block.block] ** 0.5, rel=1e-4)
            relative = (squares[block.block] / weights[block.block]) ** 0.5
            assert block.relative_norm == pytest.approx(relative, rel=1e-3)  # the server's weights are bf16
            if name != "full_diff":  # whose bias has one dimension
                assert block.rms == pytest.approx((squares[block.block] / counts[block.block]) ** 0.5, rel=1e-4)


def test_an_inspection_tells_ranks_alphas_and_metadata(client: Client, root: Path) -> None:
    save_file(
        {
            "diffusion_model.img_in.lora_A.weight": torch.ones(2, 64, dtype=torch.bfloat16),
            "diffusion_model.img_in.lora_B.weight": torch.zeros(64, 2, dtype=torch.bfloat16),
            "diffusion_model.img_in.alpha": torch.tensor(4.0),
            "text\x1b[31m\nencoder.lora_A.weight": torch.ones(1, 1),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 1),
        },
        root / "a.safetensors",
        {"ss_base_model_version": "flux1\x1b", "name": "x" * 5000},
    )
    found = client.inspect_lora("a.safetensors", model="chroma-mini")
    assert (found.ranks, found.alphas, found.dtypes) == ((2,), (4.0,), ("BF16",))
    assert (found.matched_key_count, found.unmatched_key_count, found.changed_parameter_count) == (3, 2, 1)
    assert "text\\x1b[31m\\nencoder.lora_A.weight" in found.unmatched_keys
    assert [(part.name, part.key_count) for part in found.unsupported] == [("text encoder", 1)]
    assert len(found.metadata["name"]) == 2000
    assert [warning.code for warning in found.warnings] == [
        "LORA_FOR_ANOTHER_MODEL", "LORA_WITHOUT_EFFECT", "LORA_PART_UNSUPPORTED", "LORA_KEYS_UNMATCHED",
    ]  # fmt: skip
    assert "flux1\\x1b" in found.warnings[0].message
    events = client.generate(
        "a", model="chroma-mini", width=64, height=64, sample_steps=1, loras=["a.safetensors"]
    )
    (prepared,) = [event for event in events if isinstance(event, chromarpc.Prepared)]
    assert [(warning.code, warning.message) for warning in prepared.warnings] == [
        (warning.code, warning.message) for warning in found.warnings
    ]
    assert {warning.field for warning in prepared.warnings} == {"loras.0.path"}


def test_an_alpha_that_float16_cannot_hold_is_told(client: Client, root: Path) -> None:
    tensors = load_file(RECORDED / "aitk_lokr_full.safetensors")
    alphas = [name for name in tensors if name.endswith(".alpha")]
    for name in alphas:
        tensors[name] = torch.tensor(9999999999.0).to(torch.float16)
    save_file(tensors, root / "a.safetensors")
    found = client.inspect_lora("a.safetensors")
    assert [warning.code for warning in found.warnings] == ["LORA_ALPHA_NOT_FINITE"]
    assert found.alphas == ()


def test_a_file_below_the_root_is_named_by_the_hash_that_an_inspection_tells(client: Client, root: Path) -> None:
    shutil.copy(RECORDED / "aitk.safetensors", root / "hashed.safetensors")
    sha256 = client.inspect_lora("hashed.safetensors").sha256
    (listed,) = [lora for lora in client.list_loras() if lora.path == "hashed.safetensors"]
    assert listed.sha256 == sha256
    assert client.inspect_lora(f"sha256:{sha256}").sha256 == sha256


def test_what_cannot_be_inspected_is_told_as_a_generation_would(client: Client, root: Path) -> None:
    (root / "garbage.safetensors").write_bytes(b"\0" * 100)
    tensors = load_file(RECORDED / "aitk.safetensors")
    save_file({**tensors, next(iter(tensors)): tensors[next(iter(tensors))] * torch.inf}, root / "inf.safetensors")
    save_file({"a.lora_A.weight": torch.ones(1, 1), "a.lora_B.weight": torch.ones(1, 1)}, root / "b.safetensors")
    (root.parent / "secret.safetensors").write_bytes((RECORDED / "aitk.safetensors").read_bytes())
    for path, kind in (
        ("garbage.safetensors", chromarpc.LoraInvalid),
        ("inf.safetensors", chromarpc.LoraInvalid),
        ("b.safetensors", chromarpc.LoraIncompatible),
        ("nothing.safetensors", chromarpc.LoraNotFound),
        ("../secret.safetensors", chromarpc.LoraNotFound),
        (str(root.parent / "secret.safetensors"), chromarpc.LoraNotFound),
        (f"sha256:{'0' * 64}", chromarpc.LoraNotFound),
        ("", chromarpc.LoraNotFound),
    ):
        with pytest.raises(kind) as caught:
            client.inspect_lora(path)
        assert caught.value.violations[0].field == "path", path
        assert str(root.parent) not in str(caught.value)
    with pytest.raises(chromarpc.ModelNotFound):
        client.inspect_lora("b.safetensors", model="nothing")


def test_an_inspection_needs_the_models_files(
    serve: Callable[..., RunningServer], root: Path, tmp_path: Path
) -> None:
    shutil.copy(RECORDED / "aitk.safetensors", root)
    (tmp_path / "empty").mkdir()
    with (
        Client(serve(lora_root=root, model_folder={"chroma": tmp_path / "empty"}).target) as client,
        pytest.raises(chromarpc.WeightsMissing, match="chromarpc-server fetch chroma"),
    ):
        client.inspect_lora("aitk.safetensors")


class Shell:
    """Runs the command against one server."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server

    def __call__(self, *arguments: str) -> Any:
        result = CliRunner().invoke(app, list(arguments), env={"CHROMARPC_TARGET": self._server.target})
        assert "Traceback" not in result.stderr
        return result


@pytest.fixture
def shell(library_server: RunningServer) -> Shell:
    return Shell(library_server)


def test_the_command_uploads_lists_inspects_and_deletes(shell: Shell) -> None:
    assert shell("lora", "ls").stderr == "the server has no LoRAs\n"
    path = f"sha256:{sha256_of(RECORDED / 'aitk.safetensors')}"
    uploaded = shell("lora", "upload", str(RECORDED / "aitk.safetensors"), "--name", "mine")
    assert (uploaded.exit_code, uploaded.stdout) == (0, f"{path}\n")
    listed = shell("lora", "ls").stdout
    assert listed.startswith(path)
    assert listed.endswith("upload  mine\n")
    entry = json.loads(shell("lora", "ls", "--json").stdout)["loras"][0]
    assert (entry["path"], entry["source"], entry["filename"]) == (path, "upload", "mine")
    inspected = shell("lora", "inspect", path).stdout
    assert "ai-toolkit LoRA" in inspected
    assert "double_blocks.0" in inspected
    assert "█" in inspected
    assert re.search(r"double_blocks\.0 +\S+ +[\d.]+ %", inspected)
    blocks = json.loads(shell("lora", "inspect", path, "--json").stdout)["blocks"]
    assert {"block", "norm", "rms", "has_magnitude", "relative_norm"} == set(blocks[0])
    assert shell("lora", "rm", path).exit_code == 0
    again = shell("lora", "rm", path)
    assert (again.exit_code, again.stderr) == (2, "error: path: the server has no upload with this hash\n")
    assert shell("lora", "upload", "/no/such/file").exit_code == 2


def test_control_characters_are_never_shown_raw(shell: Shell, root: Path, tmp_path: Path) -> None:
    evil = "evil\x1b[31m\x07\u202e"
    shutil.copy(RECORDED / "aitk.safetensors", root / f"{evil}.safetensors")
    save_file(
        {
            **load_file(RECORDED / "kohya.safetensors"),
            f"{evil}.lora_A.weight": torch.ones(1, 1),
        },
        tmp_path / "b",
        {evil: f"{evil}\r\n", "ss_base_model_version": evil},
    )
    uploaded = shell("lora", "upload", str(tmp_path / "b"), "--name", evil)
    outputs = [
        uploaded,
        shell("lora", "ls"),
        shell("lora", "inspect", f"{evil}.safetensors"),
        shell("lora", "inspect", uploaded.stdout.strip()),
        shell("lora", "inspect", evil),
        shell("lora", "rm", evil),
    ]
    for output in outputs:
        text = output.stdout + output.stderr
        assert not any(character in text for character in "\x1b\x07\u202e\r")
    assert "evil�[31m��.safetensors" in outputs[1].stdout
    assert "evil\\x1b" in outputs[3].stdout


def test_uploads_lie_in_the_users_data_folder_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert ServerSettings().data_dir == tmp_path / "chromarpc"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert ServerSettings().data_dir == Path.home() / ".local" / "share" / "chromarpc"
    settings = ServerSettings(data_dir=tmp_path, max_upload_bytes="1GiB", upload_expiry_s=5)
    limits = settings.upload_limits()
    assert (limits.max_file_bytes, limits.expiry_s) == (2**30, 5)


def test_an_absolute_path_below_the_root_draws_and_is_told_back_as_it_was_sent(client: Client, root: Path) -> None:
    shutil.copy(RECORDED / "aitk.safetensors", root)
    absolute = str(root / "aitk.safetensors")
    by_name, by_path = (
        list(client.generate("a", loras=[chromarpc.Lora(path)], **SMALL))
        for path in ("aitk.safetensors", absolute)
    )
    for events, path in ((by_name, "aitk.safetensors"), (by_path, absolute)):
        (accepted,) = [event for event in events if isinstance(event, chromarpc.Accepted)]
        (prepared,) = [event for event in events if isinstance(event, chromarpc.Prepared)]
        assert [lora.path for lora in accepted.loras] == [adapter.path for adapter in prepared.adapters] == [path]
    assert client.inspect_lora(absolute, model="chroma-mini").path == absolute
    assert client.create_job("a", loras=[absolute], **SMALL)
    (listed,) = client.list_loras()
    assert listed.path == "aitk.safetensors"
    answers = set()
    for path in ("/etc/passwd", "/none", f"{root}/none.safetensors", str(root)):
        with pytest.raises(chromarpc.LoraNotFound) as caught:
            client.create_job("a", loras=[path], **SMALL)
        answers.add((caught.value.message, tuple((v.field, v.description) for v in caught.value.violations)))
    assert len(answers) == 1
