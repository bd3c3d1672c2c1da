"""Secrets are planted everywhere a client can put them, and everything the server wrote is searched for them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

import chromarpc
from chromarpc.v1 import generation_service_pb2, generation_service_pb2_grpc
from chromarpc_server.domain.requests import GenerationRequest
from chromarpc_server.transport.access.bad_tokens import FREE_FAILURES
from chromarpc_server.transport.messages.requests import generation_request
from chromarpc_server.transport.server import SERVICES
from tests.security.conftest import TOKENS, entry

SECRETS = {
    "known token": TOKENS["alice"],
    "unknown token": "chromarpc_plantedUNKNOWNtoken",
    "hf_token": "hf_plantedHUGGINGFACEtoken",
    "bad hf_token": "hf_planted with spaces",
    "metadata": "plantedMETADATAvalue",
    "password": "plantedPASSWORDinAurl",
}
PROMPTS = {
    "prompt": "plantedPROMPTwords",
    "trigger word": "plantedTRIGGERword",
    "negative prompt": "plantedNEGATIVEwords",
}


@dataclass
class Watched:
    """A server process and everything it says."""

    process: subprocess.Popen[str]
    target: str
    folder: Path
    metrics_url: str
    told: list[str] = field(default_factory=list)
    """What clients were told: events, errors, details."""

    def metrics(self) -> str:
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:  # noqa: S310
            text: str = answer.read().decode()
            return text

    def written(self) -> dict[str, str]:
        """Every place that the server writes to, after its end."""
        files = {
            str(path.relative_to(self.folder)): path.read_bytes().decode("utf-8", "replace")
            for path in self.folder.rglob("*")
            if path.is_file() and path.name != "callers.toml"
        }
        assert {"stdout", "stderr"} <= set(files)
        return files


@pytest.fixture(params=["text", "json"])
def watched(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Watched]:
    (tmp_path / "callers.toml").write_text(entry("alice", TOKENS["alice"]))
    command = [sys.executable, "-m", "chromarpc_server", "--port", "0", "--device", "cpu", "--metrics-port", "0"]
    command += ["--model-folder", f"chroma-mini={tiny_checkpoint}", "--data-dir", str(tmp_path / "data")]
    command += ["--callers", str(tmp_path / "callers.toml"), "--log-format", request.param]
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    with (
        out.open("w") as to_out,
        err.open("w") as to_err,
        subprocess.Popen(command, stdout=to_out, stderr=to_err, text=True) as process,
    ):
        while "listens on " not in out.read_text() or "adapters:" not in out.read_text():
            assert process.poll() is None, err.read_text()
        target = out.read_text().split("listens on ")[1].split()[0]
        line = next(line for line in err.read_text().splitlines() if "metrics.listening" in line)
        port = json.loads(line)["port"] if request.param == "json" else line.rpartition("port=")[2]
        yield Watched(process, target, tmp_path, f"http://127.0.0.1:{port}/metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def body(**more: Any) -> dict[str, Any]:
    prompt = {"prompt": f"[trigger] {PROMPTS['prompt']}", "neg": PROMPTS["negative prompt"], "width": 64}
    prompt |= {"height": 64, "sample_steps": 2}
    return {
        "model": "chroma-mini",
        "hf_token": SECRETS["hf_token"],
        "trigger_word": PROMPTS["trigger word"],
        "prompts": [prompt],
    } | more


def bodies() -> list[dict[str, Any]]:
    """Requests that succeed, and that fail at every depth, each with secrets in it."""
    url = "https://huggingface.co/a/b/resolve/main/c.safetensors"
    wrong = [
        {"model": "nothing"},
        {"profile": "nothing"},
        {"kv_cache": True},
        {"loras": [{"path": "../../etc/passwd"}]},
        {"loras": [{"path": "none.safetensors"}]},
        {"loras": [{"path": f"sha256:{'0' * 64}"}]},
        {"loras": [{"path": "http://127.0.0.1:1/a.safetensors"}]},
        {"loras": [{"path": "https://nosuchhost.invalid/a.safetensors"}]},
        {"loras": [{"path": url}], "hf_token": SECRETS["bad hf_token"]},
        {"loras": [{"path": "ftp://host/a"}]},
        {"loras": [{"path": f"https://user:{SECRETS['password']}@huggingface.co/a/b/resolve/main/c.safetensors"}]},
        {"prompts": []},
        {"prompts": [{"prompt": PROMPTS["prompt"], "width": 1, "seed": -5, "ctrl_img": PROMPTS["prompt"]}]},
        {"prompts": [{"prompt": PROMPTS["prompt"] * 5000}]},
        {"request_id": "not a uuid"},
    ]
    return [body(), body(preview={"every_n_steps": 1}), *(body(**more) for more in wrong)]


def ask(watched: Watched, method: Any, request: Message, token: str, *, streams: bool) -> None:
    """Makes a call and keeps what it is told, however it ends."""
    metadata = (("authorization", f"Bearer {token}"), ("x-api-key", SECRETS["metadata"]))
    try:
        answer = method(request, metadata=metadata, timeout=30)
        messages = list(answer) if streams else [answer]
        watched.told += [f"{message}" for message in messages]
    except grpc.RpcError as error:
        watched.told += [f"{error.code()} {error.details()}", f"{error.trailing_metadata()}"]


def test_nothing_that_the_server_writes_holds_a_secret(watched: Watched) -> None:
    with grpc.insecure_channel(watched.target) as channel:
        generate = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate
        for one in bodies():
            request = ParseDict(one, generation_service_pb2.GenerateRequest(), ignore_unknown_fields=True)
            for token in (SECRETS["known token"], SECRETS["unknown token"]):
                ask(watched, generate, request, token, streams=True)
        # A call that is broken off in the middle.
        long = body(prompts=[{"prompt": PROMPTS["prompt"], "width": 256, "height": 256, "sample_steps": 150}])
        request = ParseDict(long, generation_service_pb2.GenerateRequest())
        metadata = (("authorization", f"Bearer {TOKENS['alice']}"),)
        running = generate(request, metadata=metadata)
        next(running)
        running.cancel()
        # Every method of every service, with a secret in every field of text or bytes, and with bytes that are no
        # message but hold one.
        for service in SERVICES:
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                kind = channel.unary_stream if method.server_streaming else channel.unary_unary
                planted = planted_in_every_field(method.input_type)
                for data in (planted.SerializeToString(), b"\xff" + SECRETS["metadata"].encode()):
                    for token in (SECRETS["known token"], SECRETS["unknown token"]):
                        ask(watched, kind(path), data, token, streams=method.server_streaming)  # type: ignore[arg-type]
    with pytest.raises(chromarpc.StatusError), chromarpc.Client(watched.target, token="chromarpc_x") as client:
        client.server_info()
    metrics = watched.metrics()
    watched.process.send_signal(signal.SIGTERM)
    assert watched.process.wait(60) == 0
    places = {"what clients were told": "\n".join(watched.told), "metrics": metrics, **watched.written()}
    for name, secret in SECRETS.items():
        for place, text in places.items():
            assert secret not in text, f"{name} is in {place}"
    for name, words in PROMPTS.items():
        for place in ("stdout", "stderr", "metrics"):
            assert words not in places[place], f"{name} is in {place}"
    # It did look where they could have been.
    assert places["what clients were told"].count("UNAUTHENTICATED") >= FREE_FAILURES
    assert places["what clients were told"].count("too many calls from your address") > 20
    assert places["stderr"].count("audit.") > 10
    assert PROMPTS["prompt"] in places["what clients were told"]
    assert "job.completed" in places["stderr"]
    assert "job.failed" in places["stderr"] or "job.cancelled" in places["stderr"]
    assert "INTERNAL" not in places["what clients were told"]
    assert "Traceback" not in places["stderr"]


def planted_in_every_field(descriptor: Any, depth: int = 0) -> Message:
    """A message with a secret in every string and bytes field, at every depth."""
    from google.protobuf import message_factory

    message = message_factory.GetMessageClass(descriptor)()
    for own in descriptor.fields:
        if own.message_type is not None and not own.message_type.GetOptions().map_entry and depth < 3:
            inner = planted_in_every_field(own.message_type, depth + 1)
            if own.is_repeated:
                getattr(message, own.name).add().CopyFrom(inner)
            else:
                getattr(message, own.name).CopyFrom(inner)
        elif own.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            # What names things is told back; what is secret by its meaning is not.
            text = SECRETS["hf_token"] if own.name == "hf_token" else PROMPTS["prompt"]
            value: Any = text if own.type == FieldDescriptor.TYPE_STRING else text.encode()
            if own.is_repeated:
                getattr(message, own.name).append(value)
            else:
                setattr(message, own.name, value)
    return message


def test_no_repr_shows_a_secret() -> None:
    request = ParseDict(body(), generation_service_pb2.GenerateRequest())
    parsed = generation_request(request)
    assert isinstance(parsed, GenerationRequest)
    assert parsed.hf_token == SECRETS["hf_token"]
    with chromarpc.Client("127.0.0.1:1", token=SECRETS["known token"]) as client:
        texts = [repr(parsed), repr(client), repr(vars(client))]
    for text in texts:
        assert not any(secret in text for secret in SECRETS.values())
