"""Adapters named by URL, through a real server, a real client and a real HTTP server."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import http.server
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import chromarpc
import chromarpc_server.app
from chromarpc_server.adapters.downloads.fetching import AdapterDownloads
from chromarpc_server.adapters.public_http.client import PublicClient
from chromarpc_server.adapters.sources import FoundAdapters
from chromarpc_server.jobs.store.job_store import JobStore
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

Serve = Callable[..., RunningServer]
SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
FILE = (GOLDENS / "adapters" / "aitk.safetensors").read_bytes()
SECRET = "hf_planted0secret"


class Host:
    """Serves one adapter; `/slow` stops half-way until `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.half_sent = threading.Event()
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/missing"):
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(FILE)))
                self.end_headers()
                middle = len(FILE) // 2
                self.wfile.write(FILE[:middle])
                if self.path.startswith("/slow"):
                    self.wfile.flush()
                    host.half_sent.set()
                    host.release.wait(30)
                self.wfile.write(FILE[middle:])

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def stop(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def host() -> Iterator[Host]:
    running = Host()
    yield running
    running.stop()


@pytest.fixture
def serve_urls(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Servers for which loopback counts as a public address."""
    reachable = functools.partial(PublicClient, is_allowed=lambda _: True)
    monkeypatch.setattr(chromarpc_server.app, "PublicClient", reachable)
    return functools.partial(serve, data_dir=tmp_path / "data", lora_hosts=["127.0.0.1"])


def _ask(client: chromarpc.Client, path: str, **options: Any) -> list[Any]:
    return list(client.generate("a", **SMALL, loras=[chromarpc.Lora(path)], **options))


def test_an_adapter_is_fetched_told_of_and_kept(serve_urls: Serve, host: Host, tmp_path: Path) -> None:
    server = serve_urls()
    sha256 = hashlib.sha256(FILE).hexdigest()
    with chromarpc.Client(server.target) as client:
        events = _ask(client, host.url("/a.safetensors?download=true"))
        stages = [event.stage for event in events if isinstance(event, chromarpc.Loading)]
        assert stages[0] == chromarpc.LoadingStage.DOWNLOADING
        (prepared,) = [event for event in events if isinstance(event, chromarpc.Prepared)]
        assert prepared.adapters[0].sha256 == sha256
        assert prepared.adapters[0].path == host.url("/a.safetensors?download=true")
        again = _ask(client, f"sha256:{sha256}")
        (prepared,) = [event for event in again if isinstance(event, chromarpc.Prepared)]
        assert prepared.weights.source == chromarpc.WeightsSource.RESIDENT
    assert {path.name for path in (tmp_path / "data" / "downloads").glob("*.*")} == {
        f"{sha256}.safetensors",
        f"{sha256}.json",
    }


def test_an_adapter_behind_a_url_is_inspected_and_kept(serve_urls: Serve, host: Host, tmp_path: Path) -> None:
    server = serve_urls()
    with chromarpc.Client(server.target) as client:
        found = client.inspect_lora(host.url("/a.safetensors"), model="chroma-mini")
        assert (found.sha256, found.path) == (hashlib.sha256(FILE).hexdigest(), host.url("/a.safetensors"))
        assert client.inspect_lora(f"sha256:{found.sha256}", model="chroma-mini").blocks == found.blocks
        with pytest.raises(chromarpc.LoraNotFound) as caught:
            client.inspect_lora(host.url("/missing"), model="chroma-mini")
        assert [violation.field for violation in caught.value.violations] == ["path"]
        with pytest.raises(chromarpc.InvalidRequest) as refused:
            client.inspect_lora("http://elsewhere.example/a", model="chroma-mini", hf_token=SECRET)
        assert [violation.field for violation in refused.value.violations] == ["path"]


def test_an_inspection_of_a_slow_url_holds_up_no_other(serve_urls: Serve, host: Host) -> None:
    server = serve_urls()
    with chromarpc.Client(server.target) as client, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.inspect_lora, host.url("/slow"), model="chroma-mini")
        assert host.half_sent.wait(10)
        client.inspect_lora(host.url("/a.safetensors"), model="chroma-mini")
        assert not slow.done()
        host.release.set()
        assert slow.result(10).sha256 == hashlib.sha256(FILE).hexdigest()


def test_a_missing_file_is_told_at_its_field(serve_urls: Serve, host: Host) -> None:
    server = serve_urls()
    with chromarpc.Client(server.target) as client:
        with pytest.raises(chromarpc.LoraNotFound) as caught:
            _ask(client, host.url("/missing"))
        assert [violation.field for violation in caught.value.violations] == ["loras.0.path"]
        assert client.generate_images("still serving", **SMALL)


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "2130706433"])
def test_addresses_inside_the_network_are_refused_in_the_same_words(
    serve: Serve, tmp_path: Path, address: str
) -> None:
    server = serve(data_dir=tmp_path)
    with chromarpc.Client(server.target) as client, pytest.raises(chromarpc.InvalidRequest) as caught:
        _ask(client, f"http://{address}/latest/meta-data")
    assert [violation.field for violation in caught.value.violations] == ["loras.0.path"]
    assert "public address" in caught.value.message


def test_a_server_that_fetches_nothing_says_so(serve: Serve, tmp_path: Path) -> None:
    server = serve(data_dir=tmp_path, lora_urls=False)
    with chromarpc.Client(server.target) as client, pytest.raises(chromarpc.InvalidRequest, match="fetches no"):
        _ask(client, "https://example.org/a.safetensors")


def test_a_slow_download_holds_nobody_up_and_ends_with_its_caller(
    serve_urls: Serve, host: Host, tmp_path: Path
) -> None:
    server = serve_urls()
    with chromarpc.Client(server.target) as client:
        slow = client.generate("a", **SMALL, loras=[chromarpc.Lora(host.url("/slow"))])
        next(slow)
        assert host.half_sent.wait(10)
        assert client.generate_images("meanwhile", **SMALL)
        slow.cancel()
        host.release.set()
        assert client.generate_images("after", **SMALL)
    assert server.stop() == 0
    assert list((tmp_path / "data" / "downloads").glob("unfinished/*")) == []
    assert list((tmp_path / "data" / "downloads").glob("*.*")) == []


def test_a_job_that_is_cancelled_right_after_its_download_lets_the_file_go(
    serve_urls: Serve, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting, released = threading.Event(), threading.Event()

    async def note_for_ever(*_: object) -> None:
        noting.set()
        await asyncio.Event().wait()

    def release(found: FoundAdapters) -> None:
        if found.downloads:
            released.set()

    monkeypatch.setattr(JobStore, "note_adapters", note_for_ever)
    monkeypatch.setattr(FoundAdapters, "release", release)
    server = serve_urls()
    with chromarpc.Client(server.target) as client:
        job = client.create_job("a", loras=[host.url("/a.safetensors")], **SMALL)
        assert noting.wait(20)
        client.cancel_job(job.job_id)
        assert released.wait(20)
        assert client.server_info().queue.queued_jobs == 0


def test_a_slow_download_ends_with_its_deadline(serve_urls: Serve, host: Host) -> None:
    server = serve_urls()
    with chromarpc.Client(server.target) as client, pytest.raises(chromarpc.DeadlineExceeded):
        _ask(client, host.url("/slow"), timeout_s=0.5)


def test_a_token_is_neither_logged_nor_told_nor_sent_elsewhere(
    serve_urls: Serve, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve_urls(log_level="debug")
    with chromarpc.Client(server.target) as client:
        events = _ask(client, host.url("/a.safetensors"), hf_token=SECRET)
        assert SECRET not in repr(events)
        with pytest.raises(chromarpc.LoraNotFound) as caught:
            _ask(client, host.url("/missing"), hf_token=SECRET)
    assert SECRET not in repr(caught.value) + str(caught.value)
    assert SECRET not in caplog.text
    assert all(SECRET not in repr(vars(record)) for record in caplog.records)


@pytest.mark.parametrize(
    "path",
    [
        f"http://user:{SECRET}@127.0.0.1/a.safetensors",
        f"http://{SECRET}%40127.0.0.1/a.safetensors",
        f"http://127.0.0.1:1/{SECRET}\x01",
    ],
)
def test_a_url_that_may_not_be_fetched_is_refused_before_it_is_stored_or_told(
    serve_urls: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve_urls(log_level="debug", store="disk")
    asked: list[tuple[str, Callable[[chromarpc.Client], Any]]] = [
        ("loras.0.path", lambda client: client.create_job("a", loras=[path], **SMALL)),
        ("loras.0.path", lambda client: next(client.generate("a", loras=[path], **SMALL))),
        ("path", lambda client: client.inspect_lora(path, model="chroma-mini")),
    ]
    refusals: list[chromarpc.StatusError] = []
    with chromarpc.Client(server.target) as client:
        for field, ask in asked:
            try:
                ask(client)
            except chromarpc.InvalidRequest as error:
                assert [violation.field for violation in error.violations] == [field]
                refusals.append(error)
        assert list(client.list_jobs()) == []
    assert len(refusals) == len(asked)
    assert SECRET not in "".join(f"{error!r} {error} {error.violations}" for error in refusals)
    server.stop()
    assert all(SECRET not in repr(vars(record)) for record in caplog.records)
    kept = [file.read_bytes() for file in (tmp_path / "data").rglob("*") if file.is_file()]
    assert not any(SECRET.encode() in data for data in kept)


def test_a_page_is_refused_before_anything_is_fetched(serve_urls: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(*_: object, **__: object) -> None:
        raise AssertionError("it was fetched")

    monkeypatch.setattr(AdapterDownloads, "fetch", fetch)
    server = serve_urls(lora_hosts=[])
    page = "https://huggingface.co/owner/name/tree/main"
    with chromarpc.Client(server.target) as client:
        for field, ask in (
            ("loras.0.path", lambda: client.create_job("a", loras=[page], **SMALL)),
            ("path", lambda: client.inspect_lora(page, model="chroma-mini")),
        ):
            with pytest.raises(chromarpc.StatusError) as caught:
                ask()
            assert isinstance(caught.value, chromarpc.InvalidRequest)
            assert [violation.field for violation in caught.value.violations] == [field]
            assert "/resolve/" in caught.value.violations[0].description


def test_a_job_is_drawn_again_with_the_file_that_was_fetched_or_with_the_same_one_fetched_again(
    serve_urls: Serve, host: Host, tmp_path: Path
) -> None:
    def images(job_id: str) -> list[str]:
        assert isinstance(list(client.watch_job(job_id))[-1], chromarpc.Completed)
        return [image.sha256 for image in client.get_job(job_id).images]

    def drawn(**options: Any) -> str:
        return str(client.create_job("a", loras=[host.url("/a.safetensors")], **SMALL, **options).job_id)

    server = serve_urls()
    with chromarpc.Client(server.target) as client:
        plain, with_token = drawn(), drawn(hf_token=SECRET)
        before = images(plain)
        assert images(with_token) == before
        for job_id in (plain, with_token):
            assert images(client.redraw_job(job_id).job_id) == before
        for file in (tmp_path / "data" / "downloads").glob("*.*"):
            file.unlink()
        with pytest.raises(chromarpc.NotKept) as caught:
            client.redraw_job(with_token)
        assert [violation.field for violation in caught.value.violations] == ["loras.0.path"]
        assert images(client.redraw_job(plain).job_id) == before
