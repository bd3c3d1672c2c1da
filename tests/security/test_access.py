"""TLS, mutual TLS and tokens, through a real server and its clients."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

import chromarpc
from chromarpc.channel import TlsOptions
from chromarpc.v1 import model_service_pb2, model_service_pb2_grpc
from chromarpc_server.app import serve as serve_until_signal
from chromarpc_server.settings import ServerSettings
from chromarpc_server.transport.access import bad_tokens
from tests.conftest import RunningServer
from tests.security.conftest import TOKENS, Pems, issue

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 1}
Serve = Callable[..., RunningServer]
Callers = Callable[..., Path]


def tls_settings(pems: Pems, **more: Any) -> dict[str, Any]:
    return {"tls_cert": pems.cert, "tls_key": pems.key, **more}


def info(target: str, **options: Any) -> Any:
    with chromarpc.Client(target, **options) as client:
        return client.server_info()


def test_tls_from_files(serve: Serve, pems: Pems) -> None:
    target = serve(**tls_settings(pems)).target
    with chromarpc.Client(target, tls=TlsOptions(pems.ca)) as client:
        assert client.generate_images("a", **SMALL)
    with pytest.raises(chromarpc.ServerUnavailable):
        info(target)
    with pytest.raises(chromarpc.ServerUnavailable):
        info(target, tls=True)


def test_mutual_tls_wants_a_certificate_of_its_authority(serve: Serve, pems: Pems, tmp_path: Path) -> None:
    target = serve(**tls_settings(pems, tls_client_ca=pems.ca)).target
    assert info(target, tls=TlsOptions(pems.ca, pems.client_cert, pems.client_key))
    with pytest.raises(chromarpc.ServerUnavailable):
        info(target, tls=TlsOptions(pems.ca))
    issue(trustme.CA(), tmp_path, "stranger", "renderer.example", common_name="renderer")
    with pytest.raises(chromarpc.ServerUnavailable):
        info(target, tls=TlsOptions(pems.ca, tmp_path / "stranger.pem", tmp_path / "stranger.key"))


def test_a_certificate_names_its_caller(serve: Serve, pems: Pems, callers_file: Callers, tmp_path: Path) -> None:
    path = callers_file()
    path.write_text(path.read_text() + '[[callers]]\nname = "renderer"\ncertificate = "renderer.example"\n')
    target = serve(**tls_settings(pems, tls_client_ca=pems.ca, callers=path)).target
    tls = TlsOptions(pems.ca, pems.client_cert, pems.client_key)
    assert info(target, tls=tls).caller == "renderer"
    assert info(target, tls=tls, token=TOKENS["alice"]).caller == "alice"
    with pytest.raises(chromarpc.AccessDenied):
        info(target, tls=tls, token="chromarpc_wrong")
    target = serve(**tls_settings(pems, tls_client_ca=pems.ca)).target
    assert info(target, tls=tls).caller == "certificate:renderer.example"


def test_a_verified_certificate_that_no_entry_names_is_not_enough(
    serve: Serve, pems: Pems, callers_file: Callers
) -> None:
    target = serve(**tls_settings(pems, tls_client_ca=pems.ca, callers=callers_file())).target
    with pytest.raises(chromarpc.AccessDenied):
        info(target, tls=TlsOptions(pems.ca, pems.client_cert, pems.client_key))


def test_certificates_are_renewed_without_a_restart(
    serve: Serve, pems: Pems, authority: trustme.CA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="chromarpc_server")
    issue(authority, tmp_path, "live", "127.0.0.1")
    target = serve(tls_cert=tmp_path / "live.pem", tls_key=tmp_path / "live.key").target
    assert info(target, tls=TlsOptions(pems.ca))
    other = trustme.CA()
    other.cert_pem.write_to_path(tmp_path / "other.pem")
    issue(other, tmp_path / "new", "live", "127.0.0.1")
    # Half of the pair only: what there was is served on.
    (tmp_path / "new" / "live.key").replace(tmp_path / "live.key")
    _until(lambda: _logged(caplog, "tls.not_reloaded"), lambda: info(target, tls=TlsOptions(pems.ca)))
    (tmp_path / "new" / "live.pem").replace(tmp_path / "live.pem")

    def renewed() -> bool:
        try:
            return bool(info(target, tls=TlsOptions(tmp_path / "other.pem")))
        except chromarpc.ServerUnavailable:
            return False

    _until(renewed, lambda: None)
    assert _logged(caplog, "tls.reloaded")
    with pytest.raises(chromarpc.ServerUnavailable):
        info(target, tls=TlsOptions(pems.ca))


def _logged(caplog: pytest.LogCaptureFixture, event: str) -> bool:
    return any(record.getMessage() == event for record in caplog.records)


def _until(is_so: Callable[[], bool], act: Callable[[], Any]) -> None:
    """Looks until the server has noticed a file, which nothing but new connections makes it look at."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        act()
        if is_so():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it never was")


@pytest.mark.parametrize(
    ("metadata", "is_known"),
    [
        ((("authorization", f"Bearer {TOKENS['alice']}"),), True),
        ((("authorization", f"bearer  {TOKENS['alice']} "),), True),
        ((), False),
        ((("authorization", TOKENS["alice"]),), False),
        ((("authorization", f"Basic {TOKENS['alice']}"),), False),
        ((("authorization", "Bearer "),), False),
        ((("authorization", f"Bearer {TOKENS['alice'][:-1]}"),), False),
        ((("authorization", f"Bearer {'x' * 5000}"),), False),
        ((("authorization", f"Bearer {TOKENS['alice']}"), ("authorization", "Bearer x")), False),
        ((("x-authorization", f"Bearer {TOKENS['alice']}"),), False),
    ],
)  # fmt: skip
def test_a_call_needs_a_known_token(
    serve: Serve, callers_file: Callers, metadata: tuple[tuple[str, str], ...], is_known: bool
) -> None:
    server = serve(callers=callers_file())
    with grpc.insecure_channel(server.target) as channel:
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        if is_known:
            answer = models.GetServerInfo(model_service_pb2.GetServerInfoRequest(), metadata=metadata)
            assert answer.caller == "alice"
            return
        with pytest.raises(grpc.RpcError) as caught:
            models.GetServerInfo(model_service_pb2.GetServerInfoRequest(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    reason = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(reason)
    # The same words whatever was wrong.
    assert (reason.reason, dict(reason.metadata), len(status.details)) == ("UNAUTHENTICATED", {}, 1)
    assert caught.value.details() == status.message
    assert "send a token" in status.message


def test_every_service_but_health_asks_for_it(
    serve: Serve, callers_file: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method that reflection would show, none of which may answer a stranger."""
    monkeypatch.setattr(bad_tokens, "FREE_FAILURES", 100)
    server = serve(callers=callers_file())
    from chromarpc_server.transport.server import SERVICES

    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service="liveness"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        methods = [
            (f"/{service.full_name}/{method.name}", method.server_streaming)
            for service in SERVICES
            for method in service.methods
        ]
        assert len(methods) >= 9
        for method, streams in methods:
            call = channel.unary_stream(method) if streams else channel.unary_unary(method)
            with pytest.raises(grpc.RpcError) as caught:
                list(call(b"")) if streams else call(b"")
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
        ask = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        known = (("authorization", f"Bearer {TOKENS['bob']}"),)
        for version in ("v1", "v1alpha"):
            call = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
            with pytest.raises(grpc.RpcError) as caught:
                list(call(iter([ask])))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, version
            assert b"chromarpc.v1.JobService" in next(iter(call(iter([ask]), metadata=known)))


def test_bytes_of_a_stranger_are_not_parsed_and_others_are_told(serve: Serve, callers_file: Callers) -> None:
    server = serve(callers=callers_file())
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary("/chromarpc.v1.LoraService/DeleteLora")
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            ((("authorization", f"Bearer {TOKENS['bob']}"),), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff\xff\xff", metadata=metadata)
            assert caught.value.code() is code


def test_a_new_token_is_taken_and_an_old_one_refused_while_serving(serve: Serve, callers_file: Callers) -> None:
    path = callers_file()
    server = serve(callers=path)
    assert info(server.target, token=TOKENS["alice"])
    path.write_text(path.read_text().replace("alice", "alicia").replace("token_sha256", "token_sha256 ", 1))
    server.loop.call_soon_threadsafe(server.app.reload)  # as SIGHUP does
    assert info(server.target, token=TOKENS["alice"]).caller == "alicia"
    path.write_text("")
    server.loop.call_soon_threadsafe(server.app.reload)
    with pytest.raises(chromarpc.AccessDenied):
        info(server.target, token=TOKENS["alice"])


def test_the_command_line_speaks_tls_with_a_token(
    serve: Serve, pems: Pems, callers_file: Callers, tmp_path: Path
) -> None:
    server = serve(**tls_settings(pems, tls_client_ca=pems.ca, callers=callers_file()))
    (tmp_path / "token").write_text(TOKENS["alice"] + "\n")
    command = [sys.executable, "-c", "from chromarpc.cli import main; main()", "generate", "a"]
    command += ["--model", "chroma-mini", "--target", server.target, "-o", str(tmp_path / "out.png")]
    command += ["--width", "64", "--height", "64", "--sample-steps", "1", "--tls-root", str(pems.ca)]
    certificate = ["--tls-cert", str(pems.client_cert), "--tls-key", str(pems.client_key)]
    token = ["--token-file", str(tmp_path / "token")]
    environment = {key: value for key, value in os.environ.items() if key != "CHROMARPC_TOKEN"}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)

    done = run(*certificate, *token)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").stat().st_size > 0
    done = run(*certificate)
    assert done.returncode != 0
    assert "token" in done.stderr
    assert run(*token).returncode != 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda pems, tmp: {"tls_cert": tmp / "none.pem"}, "none.pem: No such file"),
        (lambda pems, tmp: {"tls_key": pems.client_key}, "is not the key of the certificate"),
        (lambda pems, tmp: {"tls_key": pems.cert}, "holds no PEM private key"),
        (lambda pems, tmp: {"tls_cert": pems.key}, "holds no PEM certificate"),
        (lambda pems, tmp: {"tls_client_ca": pems.key}, "holds no PEM certificate"),
        (lambda pems, tmp: {"callers": tmp / "none.toml"}, "none.toml: No such file"),
    ],
)
async def test_a_file_that_cannot_be_used_stops_the_start(
    pems: Pems, tmp_path: Path, change: Callable[..., dict[str, Any]], problem: str, capsys: Any
) -> None:
    settings = tls_settings(pems) | change(pems, tmp_path)
    assert await serve_until_signal(ServerSettings(port=0, device="cpu", data_dir=tmp_path, **settings)) == 1
    assert problem in capsys.readouterr().err


def test_an_encrypted_key_is_refused_without_a_prompt(pems: Pems, tmp_path: Path, capsys: Any) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    from chromarpc_server.transport.access.tls import ServerTls, TlsFiles

    key = load_pem_private_key(pems.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"passphrase"))
    )
    with pytest.raises(ValueError, match="is encrypted"):
        ServerTls(TlsFiles(pems.cert, locked))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_sighup_reads_the_callers_again_and_ends_nothing(
    tiny_checkpoint: Path, callers_file: Callers, tmp_path: Path
) -> None:
    path = callers_file()
    command = [sys.executable, "-m", "chromarpc_server", "--port", "0", "--device", "cpu", "--callers", str(path)]
    command += ["--model-folder", f"chroma-mini={tiny_checkpoint}", "--data-dir", str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert "2 known callers" in line
        path.write_text("")
        process.send_signal(signal.SIGHUP)
        while "callers.reloaded" not in process.stderr.readline():
            assert process.poll() is None
        with pytest.raises(chromarpc.AccessDenied):
            info(line.split(" (")[0].split()[-1], token=TOKENS["alice"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
