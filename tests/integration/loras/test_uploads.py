"""Adapters that are uploaded, listed, drawn with and deleted through the real client and a real server."""

from __future__ import annotations

import pickle
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc import AsyncClient, Client, HealthStatus
from chromarpc import upload as client_upload
from chromarpc.v1 import lora_service_pb2, lora_service_pb2_grpc
from chromarpc_server.adapters.uploads.registry import UploadRegistry, UploadState
from chromarpc_server.domain.errors import Draining
from chromarpc_server.settings import ServerSettings
from tests.conftest import RunningServer
from tests.integration.loras.recorded import RECORDED, SMALL, refused, sha256_of


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
    assert list((tmp_path / "data" / "uploads").glob("*/*.part")) == []


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


def test_an_upload_that_would_use_up_the_disks_reserve_is_refused_and_deleting_is_not(
    serve: Callable[..., RunningServer],
) -> None:
    server = serve()
    with Client(server.target) as client:
        path = client.upload_lora(RECORDED / "aitk.safetensors").path
        server.stop()
    with Client(serve(disk_reserve=2**60).target) as client:
        with pytest.raises(chromarpc.DiskFull, match="delete jobs or uploads") as caught:
            client.upload_lora(RECORDED / "kohya.safetensors")
        assert caught.value.retry_after_s
        client.delete_lora(path)
        assert list(client.list_loras()) == []


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


def test_an_upload_that_nobody_goes_on_with_leaves_the_disk_by_itself(
    serve: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = serve(upload_expiry_s=0.5, data_dir=tmp_path / "data")
    with grpc.insecure_channel(server.target) as channel:
        stub = lora_service_pb2_grpc.LoraServiceStub(channel)
        stub.CreateLoraUpload(lora_service_pb2.CreateLoraUploadRequest(filename="a", size_bytes=100))
    uploads = tmp_path / "data" / "uploads"
    assert list(uploads.rglob("*.part"))
    until = time.monotonic() + 20
    while list(uploads.rglob("*.part")):
        assert time.monotonic() < until, "no other upload began, and this one stays"
        time.sleep(0.05)
