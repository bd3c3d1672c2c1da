"""A stock client with TLS files, a token and reflection: `buf curl`, as docs/operations.md has it."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningServer
from tests.integration.test_foreign_client import BUF, _messages
from tests.security.conftest import TOKENS, Pems

Curl = Callable[..., list[str | Path]]


@pytest.fixture
def curl(serve: Callable[..., RunningServer], pems: Pems, callers_file: Callable[..., Path]) -> Curl:
    """A command that calls a server with TLS, client certificates and tokens."""
    server = serve(tls_cert=pems.cert, tls_key=pems.key, tls_client_ca=pems.ca, callers=callers_file())
    tls = ["--cacert", str(pems.ca), "--cert", str(pems.client_cert), "--key", str(pems.client_key)]

    def command(path: str, *options: str, token: str = TOKENS["alice"]) -> list[str | Path]:
        access = [*tls, "-H", f"authorization: Bearer {token}", "--reflect-header", "*"]
        return [BUF, "curl", "--protocol", "grpc", *access, f"https://{server.target}{path}", *options]

    return command


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def answers(command: list[str | Path]) -> list[dict[str, Any]]:
    done = run(command)
    assert done.returncode == 0, done.stderr
    return _messages(done.stdout)


def body(**prompt: Any) -> dict[str, Any]:
    return {"model": "chroma-mini", "prompts": [{"prompt": "a", "width": 64, "height": 64} | prompt]}


def test_nothing_is_told_without_the_token(curl: Curl) -> None:
    assert "chromarpc.v1.GenerationService" in run(curl("", "--list-services")).stdout
    refused = run(curl("", "--list-services", token="chromarpc_wrong"))
    assert refused.returncode != 0
    assert "not authenticated" in refused.stderr
    events = answers(curl("/chromarpc.v1.GenerationService/Generate", "-d", json.dumps(body(sample_steps=2))))
    assert "completed" in events[-1]["event"]


def test_a_job_is_left_and_come_back_to_for_its_picture(curl: Curl) -> None:
    """Acceptance: create, lose the connection, come back."""
    jobs = "/chromarpc.v1.JobService"
    asked = {"request": body(width=256, height=256, sample_steps=20)}
    (created,) = answers(curl(f"{jobs}/CreateJob", "-d", json.dumps(asked)))
    job_id = created["job"]["jobId"]
    with subprocess.Popen(
        curl(f"{jobs}/WatchJob", "-d", json.dumps({"job_id": job_id})), stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        seen = ""
        while '"step"' not in seen:
            line = watching.stdout.readline()
            assert line, "the stream ended before the first step"
            seen += line
        watching.kill()
    rest = answers(curl(f"{jobs}/WatchJob", "-d", json.dumps({"job_id": job_id, "after_sequence": 3})))
    assert int(rest[0]["event"]["sequence"]) > 3
    assert "completed" in rest[-1]["event"]
    header, *chunks = answers(curl(f"{jobs}/GetImage", "-d", json.dumps({"job_id": job_id})))
    data = b"".join(base64.b64decode(chunk["imageChunk"]["data"]) for chunk in chunks)
    assert hashlib.sha256(data).hexdigest() == header["imageHeader"]["sha256"]
    assert data.startswith(b"\x89PNG")
    # It is nobody else's.
    stranger = run(curl(f"{jobs}/GetJob", "-d", json.dumps({"job_id": job_id}), token=TOKENS["bob"]))
    assert stranger.returncode != 0
    assert "there is no such job" in stranger.stderr
