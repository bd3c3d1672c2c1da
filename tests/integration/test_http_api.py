"""The reference's HTTP API: what a body may look like, what is told of it, and its description."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from google.api import annotations_pb2
from openapi_spec_validator import OpenAPIV31SpecValidator
from safetensors.torch import save_file

from chromarpc.compat.v1 import inference_service_pb2
from chromarpc.v1 import generation_service_pb2, job_service_pb2
from chromarpc_server.transport.services.inference import InferenceServicer
from tests.conftest import RunningServer
from tests.integration.gateway_stand import SMALL, Answer, Web, gateway_to, generate, wait_until_served


@pytest.fixture(scope="module")
def web(server: RunningServer) -> Iterator[Web]:
    with gateway_to(server.port) as running:
        wait_until_served(running)
        yield running


def violations(answer: Answer) -> set[str]:
    assert (answer.status, answer.error["code"]) == (422, "INVALID_PARAMETER"), answer.body
    return {violation["field"] for violation in answer.error["details"]["violations"]}


def test_wrong_types_and_wrong_values_are_told_together(web: Web) -> None:
    body = {
        "loras": [{"path": "x", "network_multiplier": "1e999"}, {}],
        "prompts": [
            7,
            {"prompt": "b", "width": "wide", "height": 1, "guidance_scale": "NaN", "ctrl_img": "x"},
            {},
        ],
        "kv_cache": "no",
    }
    answer = web.ask("/v1/inference", body)
    assert violations(answer) == {
        "model", "loras.0.network_multiplier", "loras.1.path", "prompts.0", "prompts.1.width", "prompts.1.height",
        "prompts.1.guidance_scale", "prompts.1.ctrl_img", "prompts.2.prompt", "kv_cache",
    }  # fmt: skip
    assert len(answer.error["details"]["violations"]) == 10, "each once"


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": "none"}])
def test_a_missing_or_unknown_model_hides_nothing(web: Web, model: dict[str, Any]) -> None:
    body = {**model, "prompts": [{"prompt": "a", "width": 1}]}
    assert violations(web.ask("/v1/inference", body)) == {"model", "prompts.0.width"}


def test_a_value_of_the_wrong_type_is_not_missing_besides(web: Web) -> None:
    assert violations(web.ask("/v1/inference", {"model": 1, "prompts": {}})) == {"model", "prompts"}


def test_a_hundred_violations_and_a_count(web: Web) -> None:
    answer = web.ask("/v1/inference", {"model": "chroma-mini", "prompts": [{"width": 1, "height": 1}] * 64})
    listed = answer.error["details"]["violations"]
    assert len(listed) == 101
    assert listed[-1] == {"field": "", "description": "and 92 more"}


NOTHING = {
    "hf_token": "", "trigger_word": "", "kv_cache": None, "match_target_res": None, "loras": None,
    "output": None, "preview": None, "profile": "", "noise_draw": "", "request_id": "", "on_disconnect": "",
    "max_queue_time": None,
}  # fmt: skip
NOTHING_IN_PROMPT = {
    "trigger_word": "", "neg": "", "sampler": "", "num_frames": None, "fps": None, "resolution": "",
    "ctrl_img": "", "ctrl_img_1": "", "ctrl_img_2": "", "ctrl_img_3": "", "seed": None,
}  # fmt: skip


def test_what_means_nothing_is_accepted(web: Web) -> None:
    prompt = {"prompt": "", **SMALL, **NOTHING_IN_PROMPT}
    answer = web.ask("/v1/inference", {"model": "chroma-mini", "prompts": [prompt], **NOTHING})
    assert answer.status == 200, answer.body
    assert answer.json["warnings"] == []


def test_numbers_may_be_text(web: Web) -> None:
    prompt = {
        "prompt": "a",
        "width": "64",
        "height": "64.0",
        "sample_steps": "1",
        "guidance_scale": "4.0",
        "seed": "7",
    }
    result = generate(web, {"model": "chroma-mini", "prompts": [prompt]})
    assert [(image["width"], image["height"], image["seed"]) for image in result["outputs"]["images"]] == [
        (64, 64, 7)
    ]


def test_a_failed_job_carries_the_code_of_an_error(web: Web, lora_root: Path) -> None:
    save_file({"some.other.key": torch.zeros(1)}, lora_root / "http-misfit.safetensors")
    body = {
        "model": "chroma-mini",
        "loras": [{"path": "http-misfit.safetensors"}],
        "prompts": [{"prompt": "a", **SMALL}],
    }
    result = generate(web, body)
    assert result["status"] == "failed"
    status = web.ask(f"/v1/requests/{result['request_id']}/status").json
    for told in (result, status):
        error = told.get("detail", {}).get("error", {})
        assert error.get("code") == "LORA_INCOMPATIBLE", told
        assert error["message"] == told["error"]
        assert error["details"]["grpc_status"] == "FAILED_PRECONDITION"
        assert error["details"]["http_status"] == 400
        assert [violation["field"] for violation in error["details"]["violations"]] == ["loras.0.path"]


class _FullDevice:
    """Stands for the job service: one job that ran out of memory."""

    async def GetJob(self, request: Any, context: Any) -> job_service_pb2.GetJobResponse:  # noqa: N802
        job = job_service_pb2.Job(job_id="a", state=job_service_pb2.JOB_STATE_FAILED)
        job.failure.code = 8
        job.failure.reason = "OUT_OF_MEMORY"
        job.failure.message = "no room"
        job.failure.metadata["needed_bytes"] = "5"
        job.failure.retry_after.FromSeconds(3)
        return job_service_pb2.GetJobResponse(job=job)


class _Context:
    def invocation_metadata(self) -> tuple[()]:
        return ()


async def test_what_a_failure_tells_programs_is_told_over_http() -> None:
    servicer = InferenceServicer(_FullDevice(), None)  # type: ignore[arg-type]
    asked = inference_service_pb2.GetInferenceStatusRequest(request_id="a")
    told = json.loads((await servicer.GetInferenceStatus(asked, _Context())).data)
    assert told["error"] == "no room"
    assert told.get("detail") == {
        "error": {
            "code": "OUT_OF_MEMORY",
            "message": "no room",
            "details": {
                "needed_bytes": "5",
                "grpc_status": "RESOURCE_EXHAUSTED",
                "http_status": 429,
                "retry_after_s": 3.0,
            },
        }
    }


def test_metadata_is_about_what_was_asked_for(serve: Callable[..., RunningServer]) -> None:
    with gateway_to(serve(alias={"chroma": "chroma-mini"}).port) as web:
        wait_until_served(web)
        result = generate(web, {"model": "chroma", "prompts": [{"prompt": "a", **SMALL}]})
    metadata = result["metadata"]
    assert metadata["model"] == "chroma"
    assert [warning["code"] for warning in metadata["warnings"]] == ["MODEL_ALIASED"]
    assert 0 < metadata.get("inference_time", 0) <= metadata["timings"]["total"]
    assert result["detail"] is None


# The description.


@pytest.fixture(scope="module")
def described(web: Web) -> dict[str, Any]:
    answer = web.ask("/openapi.json")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    return dict(answer.json)


def valid(described: dict[str, Any], name: str, value: object) -> bool:
    schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def test_the_description_is_openapi_and_current(described: dict[str, Any]) -> None:
    assert described["openapi"] == "3.1.0"
    assert list(OpenAPIV31SpecValidator(described).iter_errors()) == []
    from chromarpc_server.gateway import openapi

    assert openapi.FILE.read_text(encoding="utf-8") == openapi.text(), "run `make page`"


def test_every_route_of_the_contract_is_described(described: dict[str, Any]) -> None:
    routes = {("/openapi.json", "get")}
    for method in inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods:
        rule = method.GetOptions().Extensions[annotations_pb2.http]
        kind = rule.WhichOneof("pattern")
        routes.add((getattr(rule, kind), kind))
    assert {(path, kind) for path, kinds in described["paths"].items() for kind in kinds} == routes


def test_every_described_route_is_served(web: Web, described: dict[str, Any]) -> None:
    for path, kinds in described["paths"].items():
        for kind, operation in kinds.items():
            url = path.replace("{request_id}", "none").replace("{prompt_index}", "0")
            answer = web.ask(url, {} if kind == "post" else None, method=kind.upper())
            assert str(answer.status) in operation["responses"], (path, answer.status)
            if answer.status != 200:
                assert valid(described, "Error", answer.json), answer.body


def test_every_field_of_a_request_is_described(described: dict[str, Any]) -> None:
    root = generation_service_pb2.GenerateRequest.DESCRIPTOR
    messages = {"Request": root} | {
        name: root.fields_by_name[field].message_type
        for name, field in (
            ("Lora", "loras"),
            ("Prompt", "prompts"),
            ("Output", "output"),
            ("Preview", "preview"),
            ("Trainer", "trainer"),
        )
    }
    for name, descriptor in messages.items():
        properties = described["components"]["schemas"][name]["properties"]
        assert list(properties) == [field.name for field in descriptor.fields]
        assert all(item["description"] for item in properties.values())


def test_the_recorded_requests_fit_the_description_as_they_fit_the_reference(
    described: dict[str, Any], goldens: Path
) -> None:
    recorded = json.loads((goldens / "requests/reference_requests.json").read_text())
    assert [case for case in recorded["accepted"] if not valid(described, "Request", case["request"])] == []
    assert [case for case in recorded["rejected"] if valid(described, "Request", case["request"])] == []


JUDGED_ELSEWHERE = ("profile", "request_id")
"""By what the server's device can do, and by the form of a UUID."""


def _edges(described: dict[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Field by field: values that the description takes or refuses."""
    for name, schema in described["components"]["schemas"].items():
        if name not in ("Request", "Lora", "Prompt", "Output", "Preview", "Trainer"):
            continue
        for field, item in schema["properties"].items():
            if field in JUDGED_ELSEWHERE:
                continue
            if field in ("width", "height"):
                yield from ((name, field, value) for value in (63, 64))  # where most profiles begin
            if "minimum" in item:
                step = 1 if item["type"][0] == "integer" else 0.01
                for value in (item["minimum"], item["minimum"] - step, item["maximum"], item["maximum"] + step):
                    yield name, field, value
            elif "exclusiveMinimum" in item:
                low, high = item["exclusiveMinimum"], item["maximum"]
                yield from ((name, field, value) for value in (low, low + 0.01, high, high + 0.01))
            elif "enum" in item:
                yield from ((name, field, value) for value in [*item["enum"], "other", 99, True])
            elif "$ref" not in str(item):
                yield from ((name, field, value) for value in ("", "30s", 1, 1.5, True, [], {}, None))


def test_the_server_takes_what_the_description_takes_and_nothing_else(
    described: dict[str, Any], server: RunningServer, web: Web
) -> None:
    wrong = []
    profiles = ("reference", "preview")
    for profile, (name, field, value) in itertools.product(profiles, _edges(described)):
        if profile == "preview" and name == "Trainer":
            continue  # judged by the names that the trainer knows; the others ignore them
        body: dict[str, Any] = {"model": "none", "profile": profile, "prompts": [{"prompt": "a"}]}
        match name:
            case "Request":
                body |= {field: value}
            case "Lora":
                body |= {"loras": [{"path": "a", field: value}]}
            case "Prompt":
                body |= {"prompts": [{"prompt": "a", field: value}]}
            case "Output":
                body |= {"output": {"format": "IMAGE_FORMAT_JPEG", field: value}}
            case "Trainer":
                body |= {"trainer": {field: value}}
            case _:
                body |= {"preview": {field: value}}
        # No job is made: a body in which nothing else is wrong is refused for its model.
        is_taken = web.ask("/v1/inference", body).error["code"] == "MODEL_NOT_FOUND"
        if is_taken != valid(described, "Request", body):
            wrong.append((profile, name, field, value, "taken" if is_taken else "refused"))
    assert wrong == []


def test_answers_are_as_described(web: Web, described: dict[str, Any], lora_root: Path) -> None:
    body = {"model": "chroma-mini", "prompts": [{"prompt": "[trigger]", "neg": "b", **SMALL}], "x": 1}
    submitted = web.ask("/v1/inference", body).json
    assert valid(described, "Submitted", submitted), submitted
    result = generate(web, body)
    assert valid(described, "Result", result), result
    at = f"/v1/requests/{result['request_id']}"
    status = web.ask(f"{at}/status").json
    assert valid(described, "Status", status), status
    image = web.ask(f"{at}/images/0")
    described_image = described["paths"]["/v1/requests/{request_id}/images/{prompt_index}"]["get"]["responses"][
        "200"
    ]
    assert image.headers["content-type"] in described_image["content"]
    save_file({"some.other.key": torch.zeros(1)}, lora_root / "described-misfit.safetensors")
    failed = generate(web, {**body, "loras": [{"path": "described-misfit.safetensors"}]})
    assert failed["status"] == "failed"
    assert valid(described, "Result", failed), failed
    assert valid(described, "Models", web.ask("/v1/models").json)
    assert valid(described, "Health", web.ask("/health").json)
    for told, name in ((submitted, "Submitted"), (result, "Result"), (status, "Status"), (failed, "Result")):
        assert set(told) == set(described["components"]["schemas"][name]["properties"]), "nothing is undescribed"
