"""A stock client that knows nothing but reflection: `buf curl`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import RunningServer

BUF = Path(sys.executable).parent / "buf"


def _buf_curl(server: RunningServer, *arguments: str) -> str:
    command = [BUF, "curl", "--http2-prior-knowledge", "--protocol", "grpc", f"http://{server.target}"]
    command[-1] = f"{command[-1]}{arguments[0]}"
    done = subprocess.run([*command, *arguments[1:]], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _messages(text: str) -> list[dict[str, Any]]:
    decoder, found, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        message, end = decoder.raw_decode(rest)
        found.append(message)
        rest = rest[end:].strip()
    return found


def test_services_are_listed(server: RunningServer) -> None:
    services = _buf_curl(server, "", "--list-services").split()
    assert {"chromarpc.v1.GenerationService", "chromarpc.v1.ModelService", "grpc.health.v1.Health"} <= set(
        services
    )


def test_a_generation_streams(server: RunningServer) -> None:
    body = {"model": "chroma-mini", "prompts": [{"prompt": "a", "width": 64, "height": 64, "sample_steps": 2}]}
    text = _buf_curl(server, "/chromarpc.v1.GenerationService/Generate", "-d", json.dumps(body))
    kinds = [
        next(key for key in message["event"] if key not in ("sequence", "time")) for message in _messages(text)
    ]
    assert kinds[0] == "accepted"
    assert kinds.count("step") == 2
    assert "imageHeader" in kinds
    assert kinds[-1] == "completed"
