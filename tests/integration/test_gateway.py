"""The gateway in front of a real server: the reference's HTTP API, the page, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc

from chromarpc.compat.v1 import inference_service_pb2_grpc
from chromarpc.v1 import job_event_pb2, job_service_pb2
from chromarpc_server.gateway.configuration import PAGE, Gateway, deployed_yaml
from chromarpc_server.gateway.envoy import Envoy, GatewayError, envoy_path
from chromarpc_server.transport.services.health import HealthServicer
from chromarpc_server.transport.services.inference import InferenceServicer
from tests.conftest import RunningServer
from tests.integration.gateway_stand import SMALL, Answer, Web, free_port, gateway_to, generate, wait_until_served
from tests.integration.test_foreign_client import BUF


@pytest.fixture(scope="module")
def web(server: RunningServer) -> Iterator[Web]:
    with gateway_to(server.port, origins=("https://studio.example.org",)) as running:
        wait_until_served(running)
        yield running


def test_submit_poll_fetch(web: Web) -> None:
    body = {
        "model": "chroma-mini",
        "loras": [],
        "trigger_word": "sks",
        "prompts": [{"prompt": "[trigger] a", "seed": 2**60, **SMALL}, {"prompt": "b", **SMALL}],
    }
    result = generate(web, body)
    assert result["status"] == "succeeded"
    assert result["error"] is None
    images = result["outputs"]["images"]
    assert [image["seed"] for image in images] == [2**60, 43]
    assert {(image["format"], image["width"], image["height"]) for image in images} == {("jpeg", 64, 64)}
    for image in images:
        answer = web.ask(image["url"].removeprefix(web.url))
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.body[:3] == b"\xff\xd8\xff"
        assert len(answer.body) == image["size_bytes"]
    assert result["metadata"]["timings"]["total"] > 0


def test_an_output_that_is_asked_for_is_given(web: Web) -> None:
    body = {
        "model": "chroma-mini",
        "prompts": [{"prompt": "a", **SMALL}],
        "output": {"format": "IMAGE_FORMAT_PNG"},
    }
    (image,) = generate(web, body)["outputs"]["images"]
    assert image["format"] == "png"
    assert web.ask(image["url"].removeprefix(web.url)).body[1:4] == b"PNG"


@pytest.mark.parametrize(
    "output",
    [
        {"picture_record": False},
        {"format": "IMAGE_FORMAT_JPEG_TRAINER"},
        {"format": "IMAGE_FORMAT_JPEG_TRAINER", "picture_record": True},
    ],
)
def test_a_record_that_is_spoken_of_leaves_the_format_as_it_is(web: Web, output: dict[str, Any]) -> None:
    body = {"model": "chroma-mini", "prompts": [{"prompt": "a", **SMALL}], "output": output}
    (image,) = generate(web, body)["outputs"]["images"]
    assert image["format"] == "jpeg"
    assert web.ask(image["url"].removeprefix(web.url)).body[:3] == b"\xff\xd8\xff"


def test_what_the_trainers_config_decides_is_understood(web: Web) -> None:
    trainer = {"quantize": True, "qtype": "qint8", "dtype": "float32", "lokr_form": "LOKR_FORM_WEIGHT"}
    body = {
        "model": "chroma-mini",
        "profile": "reference",
        "prompts": [{"prompt": "a", "neg": "ugly", **SMALL}],
        "trainer": trainer,
    }
    answer = web.ask("/v1/inference", body)
    assert answer.status == 200, answer.body
    assert {warning["code"] for warning in answer.json["warnings"]} == {"NEG_IGNORED", "TRAINER_OPTIONS_IGNORED"}
    answer = web.ask("/v1/inference", {**body, "trainer": {**trainer, "lokr_form": "OLD"}})
    assert (answer.status, answer.error["details"]["violations"][0]["field"]) == (422, "trainer.lokr_form")


def test_an_adapter_of_other_content_than_expected_is_refused(web: Web, lora_root: Path, goldens: Path) -> None:
    recorded = goldens / "adapters" / "aitk.safetensors"
    shutil.copy(recorded, lora_root / "pinned.safetensors")
    lora = {"path": f"sha256:{hashlib.sha256(recorded.read_bytes()).hexdigest()}", "expected_sha256": "ab" * 32}
    body = {"model": "chroma-mini", "loras": [lora], "prompts": [{"prompt": "a", **SMALL}]}
    answer = web.ask("/v1/inference", body)
    (lora_root / "pinned.safetensors").unlink()
    assert (answer.status, answer.error["code"]) == (400, "LORA_CONTENT_CHANGED")
    assert answer.error["details"]["violations"][0]["field"] == "loras.0.expected_sha256"


def test_the_recorded_requests_of_the_reference(web: Web, goldens: Path) -> None:
    recorded = json.loads((goldens / "requests/reference_requests.json").read_text())
    for case in recorded["rejected"]:
        body = {**case["request"], "model": "chroma-mini"}
        answer = web.ask("/v1/inference", body)
        assert answer.status == 422, (body, answer.body)
        named = [violation["field"] for violation in answer.error["details"]["violations"]]
        assert set(case["fields"]) <= set(named), body
    for case in recorded["accepted"]:
        body = {**case["request"], "model": "chroma-mini"}
        answer = web.ask("/v1/inference", body)
        # Its adapters are not here: everything else was accepted.
        assert (answer.status, answer.error["code"]) == (400, "LORA_NOT_FOUND"), (body, answer.body)
        assert answer.error["details"] == {"lora_path": case["request"]["loras"][0]["path"]}


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "none"}, 400, "MODEL_NOT_FOUND"),
        ({"loras": [{"path": "none.safetensors"}]}, 400, "LORA_NOT_FOUND"),
        ({"loras": [{"path": "../../etc/passwd"}]}, 400, "LORA_NOT_FOUND"),
        ({"loras": [{"path": "a", "transformer": "low"}]}, 400, "MOE_FORMAT_NOT_SUPPORTED"),
        ({"prompts": []}, 422, "INVALID_PARAMETER"),
        ({"prompts": [{"prompt": "a", "width": "wide"}]}, 422, "INVALID_PARAMETER"),
    ],
)
def test_errors_have_the_shape_of_the_reference(web: Web, change: dict[str, Any], status: int, code: str) -> None:
    answer = web.ask("/v1/inference", {"model": "chroma-mini", "prompts": [{"prompt": "a"}], **change})
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error["message"]
    assert isinstance(answer.error["details"], dict)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": 1}', b"\xff", b'{"prompts": {}}'])
def test_malformed_json(web: Web, body: bytes) -> None:
    answer = web.ask("/v1/inference", body)
    assert (answer.status, answer.error["code"]) == (422, "INVALID_PARAMETER")


def test_another_content_type(web: Web) -> None:
    answer = web.ask("/v1/inference", b'{"model":"chroma-mini"}', content_type="text/plain")
    assert (answer.status, answer.error["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


def test_a_body_that_is_too_large(web: Web) -> None:
    answer = web.ask("/v1/inference", b'"' + b"a" * 3 * 2**20 + b'"')
    assert (answer.status, answer.error["code"]) == (413, "BODY_TOO_LARGE")


def test_unknown_ids_paths_and_methods(web: Web) -> None:
    for path in ("/v1/requests/none/status", "/v1/requests/none/result", "/v1/requests/none/images/0"):
        answer = web.ask(path)
        assert (answer.status, answer.error["code"]) == (404, "REQUEST_NOT_FOUND"), path
    assert web.ask("/v1/requests/none/images/x").status == 404
    assert web.ask("/v1/nothing").status == 404
    assert web.ask("/v1/requests/none").status == 404
    answer = web.ask("/v1/inference")
    assert (answer.status, answer.error["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert web.ask("/v1/models", {}).status == 405


def test_models_and_health(web: Web) -> None:
    assert web.ask("/health").json == {"status": "healthy"}
    models = {model["id"]: model for model in web.ask("/v1/models").json["models"]}
    assert models["chroma"]["default_steps"] == 25
    assert models["chroma"]["resolution_divisor"] == 32
    assert models["chroma"]["is_video_model"] is False


def test_what_is_unknown_is_told(web: Web) -> None:
    body = {"model": "chroma-mini", "prompts": [{"prompt": "a", "colour": 1, **SMALL}]}
    warnings = web.ask("/v1/inference", body).json["warnings"]
    assert {key: warnings[0][key] for key in ("code", "field")} == {
        "code": "UNKNOWN_FIELD",
        "field": "prompts.0.colour",
    }


def test_the_page_and_its_rules(web: Web) -> None:
    page = web.ask("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"
    for path, kind in (("/page.js", "application/javascript"), ("/page.css", "text/css")):
        assert path.encode() in page.body
        assert web.ask(path).headers["content-type"] == kind
    assert web.ask("/icon.svg").headers["content-type"] == "image/svg+xml"


def test_a_host_that_is_not_ours(web: Web) -> None:
    answer = web.ask("/", host="rebound.example.org")
    assert (answer.status, answer.error["code"]) == (421, "HOST_NOT_SERVED")


def test_pages_of_other_origins(web: Web) -> None:
    path = "/chromarpc.v1.ModelService/ListModels"

    def preflight(origin: str) -> dict[str, str]:
        asked = {"origin": origin, "access_control_request_method": "POST"}
        return web.ask(path, method="OPTIONS", **asked).headers

    allowed = preflight("https://studio.example.org")
    assert allowed["access-control-allow-origin"] == "https://studio.example.org"
    assert "grpc-timeout" in allowed["access-control-allow-headers"]
    assert "access-control-allow-origin" not in preflight("https://elsewhere.example.org")
    answer = web.ask(
        path, b"\0" * 5, content_type="application/grpc-web+proto", origin="https://studio.example.org"
    )
    assert "grpc-status-details-bin" in answer.headers["access-control-expose-headers"]


def test_a_server_that_is_down() -> None:
    with gateway_to(free_port()) as web:
        answer = web.ask("/v1/models")
        assert (answer.status, answer.error["code"]) == (503, "UNAVAILABLE")
        assert web.ask("/").status == 200


def test_a_token_is_wanted(serve: Callable[..., RunningServer], tmp_path: Path) -> None:
    callers = tmp_path / "callers.toml"
    callers.write_text(f'[[callers]]\nname = "ann"\ntoken_sha256 = "{"0" * 64}"\n')
    with gateway_to(serve(callers=callers).port) as web:
        for _ in range(200):
            answer = web.ask("/v1/models")
            if answer.status != 503:
                break
            time.sleep(0.05)
        assert (answer.status, answer.error["code"]) == (401, "UNAUTHENTICATED")


async def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        envoy = Envoy(Gateway("127.0.0.1", taken.getsockname()[1], "127.0.0.1", 1))
        try:
            with pytest.raises(GatewayError, match="Address already in use"):
                await envoy.start()
        finally:
            await envoy.stop()


def test_the_file_for_an_envoy_of_ones_own(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    text = deployed_yaml()
    assert (root / "deploy/envoy.yaml").read_text() == text, "run `make page`"
    descriptor = tmp_path / "chromarpc.v1.binpb"  # as docs/web.md has it
    subprocess.run([BUF, "build", "protos", "-o", descriptor], cwd=root, check=True, timeout=60)
    here = text.replace("/etc/chromarpc/chromarpc.v1.binpb", str(descriptor))
    here = here.replace("/etc/chromarpc/openapi.json", str(PAGE.with_name("openapi.json")))
    (tmp_path / "envoy.yaml").write_text(here.replace("/etc/chromarpc/page", str(PAGE)))
    command = [envoy_path(), "--mode", "validate", "-c", tmp_path / "envoy.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


class _LargePicture:
    """Stands for the job service: one picture of 25 MB, in parts of 1 MiB."""

    SIZE = 25_000_000

    async def GetImage(self, request: Any, context: Any) -> Any:  # noqa: N802
        yield job_service_pb2.GetImageResponse(
            image_header=job_event_pb2.ImageHeader(media_type="image/png", size_bytes=self.SIZE)
        )
        for offset in range(0, self.SIZE, 2**20):
            data = bytes(min(2**20, self.SIZE - offset))
            chunk = job_event_pb2.ImageChunk(offset_bytes=offset, data=data)
            yield job_service_pb2.GetImageResponse(image_chunk=chunk)


async def test_an_image_of_25_mb() -> None:
    server = grpc.aio.server()
    servicer = InferenceServicer(_LargePicture(), None)  # type: ignore[arg-type]
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    health = HealthServicer(())
    health.set_ready(True)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def fetch() -> Answer:
        with gateway_to(port) as web:
            wait_until_served(web)
            return web.ask("/v1/requests/a/images/0")

    answer = await asyncio.to_thread(fetch)
    health.close()
    await server.stop(0)
    assert answer.headers["content-type"] == "image/png"
    assert len(answer.body) == _LargePicture.SIZE
