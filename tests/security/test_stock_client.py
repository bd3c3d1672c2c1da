"""A stock client with TLS files, a token and reflection, and nothing else: `buf curl`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import RunningServer
from tests.integration.test_foreign_client import BUF, _messages
from tests.security.conftest import TOKENS, Pems


def test_generate_over_tls_with_a_token(
    serve: Callable[..., RunningServer], pems: Pems, callers_file: Callable[..., Path]
) -> None:
    server = serve(tls_cert=pems.cert, tls_key=pems.key, tls_client_ca=pems.ca, callers=callers_file())
    tls = ["--cacert", str(pems.ca), "--cert", str(pems.client_cert), "--key", str(pems.client_key)]

    def curl(path: str, *options: str, token: str = TOKENS["alice"]) -> subprocess.CompletedProcess[str]:
        access = [*tls, "-H", f"authorization: Bearer {token}", "--reflect-header", "*"]
        command = [BUF, "curl", "--protocol", "grpc", *access, f"https://{server.target}{path}", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    listed = curl("", "--list-services")
    assert "chromarpc.v1.GenerationService" in listed.stdout, listed.stderr
    body: dict[str, Any] = {"model": "chroma-mini", "prompts": [{"prompt": "a", "width": 64, "height": 64}]}
    body["prompts"][0]["sample_steps"] = 2
    done = curl("/chromarpc.v1.GenerationService/Generate", "-d", json.dumps(body))
    assert done.returncode == 0, done.stderr
    assert "completed" in _messages(done.stdout)[-1]["event"]
    refused = curl("", "--list-services", token="chromarpc_wrong")
    assert refused.returncode != 0
    assert "not authenticated" in refused.stderr
