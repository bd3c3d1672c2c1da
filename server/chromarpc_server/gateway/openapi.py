"""The HTTP API as an OpenAPI 3.1 document: `openapi.json` beside this file, which the gateway serves.

What a request may hold comes from the contract and from the ranges of `domain/requests.py`; the answers are those
of `answers.py`. A test validates real answers against it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from google.protobuf import duration_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from chromarpc.v1 import generation_service_pb2
from chromarpc_server.domain.requests import FRAMES, MIN_SEED, RANGES, RESOLUTIONS
from chromarpc_server.domain.sampling_choices import (
    FLOWMATCH,
    LEAST_STEPS,
    SAMPLERS,
    SCHEDULES,
    SHIFT_RANGE,
    DrawingSettings,
)
from chromarpc_server.domain.sampling_options import COMFYUI_PROFILES
from chromarpc_server.domain.trainer import PREVIEW_PROFILES, TRAINER_SIZES
from chromarpc_server.gateway.answers import Schema, answer_schemas, or_null, ref

FILE: Final = Path(__file__).with_name("openapi.json")
JSON: Final = "application/json"

_ABOUT: Final = " ".join(
    (
        "Submit a request, poll its status, fetch its result: the HTTP API of ai-toolkit's inference server,",
        "over the queue of chromarpc. Keys that are not described are left out, with a warning in the answer.",
        "`null` means left out, and so does an empty text anywhere but in `prompts[].prompt`; a number may",
        "also be written as text. A body is at most 1 MiB. The server's settings may limit prompts, adapters,",
        "pixels and steps further.",
    )
)

_SIDE: Final = (
    "Pixels, floored to a multiple of the model's `resolution_divisor`, 64 or more; the profiles `preview` and "
    "`preview-exact` raise less to 64 and floor to 16. The model's default when left out."
)
DESCRIPTIONS: Final = {
    "model": "Id of the model, as `/v1/models` lists it.",
    "loras": "Adapters, applied in this order; none serves the bare model.",
    "loras.path": "File below the server's adapter root, `sha256:` and a hash, or an http(s) URL.",
    "loras.transformer": "For models of two transformers; Chroma has one.",
    "loras.network_multiplier": "Strength; 1 when left out.",
    "loras.expected_sha256": "SHA-256 that the file must have; the job fails if it has another one.",
    "hf_token": "Hugging Face token for adapters that need one. Neither logged nor stored.",
    "trigger_word": "Replaces `[trigger]` in every prompt that has no trigger word of its own.",
    "prompts": "What to draw: one image for each.",
    "prompts.prompt": "What to draw; may be empty.",
    "prompts.trigger_word": "Replaces `[trigger]` in this prompt, before the request's own.",
    "prompts.width": _SIDE,
    "prompts.height": _SIDE,
    "prompts.guidance_scale": "Classifier-free guidance; the model's default when left out.",
    "prompts.sample_steps": "Denoising steps; the model's default when left out.",
    "prompts.neg": "Negative prompt: honoured with `use_neg`, and in `preview` and `preview-exact`; else answered "
    "by a warning.",
    "prompts.seed": f"Seed of the noise; {MIN_SEED} draws one; 42 plus the prompt's index when left out.",
    "prompts.sampler": "Sampler: `flowmatch` is the reference's, the others are ComfyUI's. The model's default "
    "when left out.",
    "prompts.num_frames": "Chroma draws single images.",
    "prompts.fps": "Frames a second: has no effect on an image, and is answered by a warning.",
    "prompts.resolution": "Chroma has one way.",
    "prompts.ctrl_img": "Chroma takes no control image.",
    "prompts.ctrl_img_1": "Chroma takes no control image.",
    "prompts.ctrl_img_2": "Chroma takes no control image.",
    "prompts.ctrl_img_3": "Chroma takes no control image.",
    "prompts.schedule": "Schedule of noise levels: `flowmatch` is the reference's, the others are ComfyUI's. The "
    "model's default when left out.",
    "prompts.shift": "Fixed shift of the schedule towards noise; 1 shifts nothing. When left out, the model's "
    "default where `schedule` is left out too, else the schedule's own.",
    "prompts.use_neg": "Makes `neg` the unconditional text, in every profile.",
    "kv_cache": "An option of other models.",
    "match_target_res": "An option of other models.",
    "output": "How images are encoded; JPEG of quality 95 when left out.",
    "output.format": "File format; PNG where `output` names none.",
    "output.quality": "Of JPEG and WebP; 95 when left out.",
    "output.picture_record": "Whether the image carries what it was drawn with; the format decides if left out.",
    "preview": "Previews of unfinished images, for those who watch the job over gRPC.",
    "preview.every_n_steps": "0 sends none.",
    "preview.max_side_px": "Pixels of the longer side; 256 when left out.",
    "profile": "Numerics profile: `reference`, `exact`, `fp8`, `preview` or `preview-exact`; the server's default "
    "when left out.",
    "noise_draw": "What a seed means.",
    "request_id": "A UUID that makes the call safe to repeat: the same request under it finds the same job.",
    "on_disconnect": "Has no meaning here: nobody is attached to the job.",
    "trainer": "What ai-toolkit's training config decides; has an effect in `preview` and `preview-exact`.",
    "trainer.quantize": "`model.quantize`: whether the transformer is quantized; it is when left out.",
    "trainer.qtype": "`model.qtype`: the quantizer; `qfloat8` when left out.",
    "trainer.quantize_te": "`model.quantize_te`: whether the text encoder is; as `quantize` when left out.",
    "trainer.dtype": "`train.dtype`: `bf16` or `float32`, in any of the trainer's spellings; `bf16` if left out.",
    "trainer.lokr_form": "How a LoKr is added to the weights.",
    "settings": "Whose way of drawing is followed where programs differ; `reference` when left out.",
    "max_queue_time": "How long the job may wait, in seconds such as `30s`; for ever when left out.",
}
_REQUIRED: Final = {"": ["model", "prompts"], "loras": ["path"], "prompts": ["prompt"]}
_ONLY: Final[dict[str, list[object]]] = {
    "loras.transformer": [""],
    "prompts.sampler": [*SAMPLERS, ""],
    "prompts.schedule": [*SCHEDULES, ""],
    "settings": [*DrawingSettings, ""],
    "prompts.num_frames": [FRAMES],
    "prompts.resolution": [*RESOLUTIONS, ""],
    **{f"prompts.{name}": [""] for name in ("ctrl_img", "ctrl_img_1", "ctrl_img_2", "ctrl_img_3")},
    "kv_cache": [False],
    "match_target_res": [False],
}
"""All that these may be besides null."""
_NAMES: Final = {
    "": "Request",
    "loras": "Lora",
    "prompts": "Prompt",
    "output": "Output",
    "preview": "Preview",
    "trainer": "Trainer",
}
_RANGES: Final = {**RANGES, "prompts.width": TRAINER_SIZES, "prompts.height": TRAINER_SIZES}
"""The widest that any profile takes."""
_KEYWORDS: Final[dict[str, Schema]] = {
    "prompts.seed": {"minimum": MIN_SEED, "maximum": 2**63 - 1},
    "prompts.shift": {"minimum": SHIFT_RANGE[0], "maximum": SHIFT_RANGE[1]},
    "loras.path": {"minLength": 1},
    "loras.expected_sha256": {"pattern": r"^([0-9a-fA-F]{64})?$"},
    "request_id": {"format": "uuid"},
}
"""What else holds for a field."""
_SIDES: Final = {side: {"minimum": RANGES[f"prompts.{side}"][0]} for side in ("width", "height")}
_TRAINERS: Final[Schema] = {
    "sampler": {"enum": [FLOWMATCH, "", None]},
    "schedule": {"enum": [FLOWMATCH, "", None]},
    "shift": {"type": "null"},
}


def _where(field: str, *values: str) -> Schema:
    """Holds for a message that gives the field one of these values."""
    return {"required": [field], "properties": {field: {"enum": list(values)}}}


_RULES: Final[dict[str, Schema]] = {
    "": {
        "allOf": [
            {
                "if": _where("profile", *sorted(PREVIEW_PROFILES)),
                "then": {"properties": {"prompts": {"items": {"properties": _TRAINERS}}}},
                "else": {"properties": {"prompts": {"items": {"properties": _SIDES}}}},
            },
            {
                "if": _where("settings", DrawingSettings.COMFYUI),
                "then": {
                    "properties": {
                        "profile": {"enum": [*COMFYUI_PROFILES, "", None]},
                        "noise_draw": {"not": {"const": "NOISE_DRAW_LEGACY"}},
                    }
                },
            },
        ]
    },
    "prompts": {
        "allOf": [
            {"if": _where("schedule", schedule), "then": {"properties": {"sample_steps": {"minimum": least}}}}
            for schedule, least in LEAST_STEPS.items()
        ]
    },
}
"""What holds between the fields of a message; for a request that names no profile, as the reference has it."""
_INTEGERS: Final = {FieldDescriptor.CPPTYPE_INT32: "int32", FieldDescriptor.CPPTYPE_INT64: "int64"}


def document() -> dict[str, Any]:
    """The whole description."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "chromarpc",
            "version": "1",
            "summary": "Text-to-image with Chroma and LoRAs over HTTP",
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {**request_schemas(), **answer_schemas()},
        },
    }


def text() -> str:
    """The file's text."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def request_schemas() -> dict[str, Schema]:
    """The messages of a request, by name."""
    schemas: dict[str, Schema] = {}
    _add_message(generation_service_pb2.GenerateRequest.DESCRIPTOR, "", schemas)
    return schemas


def _add_message(descriptor: Descriptor, path: str, schemas: dict[str, Schema]) -> Schema:
    name = _NAMES[path]
    schema: Schema = {"type": "object"}
    schemas[name] = schema
    if path in _REQUIRED:
        schema["required"] = _REQUIRED[path]
    schema["properties"] = {
        field.name: _field(field, f"{path}.{field.name}" if path else field.name, path, schemas)
        for field in descriptor.fields
    }
    schema.update(_RULES.get(path, {}))
    return {"$ref": f"#/components/schemas/{name}"}


def _field(field: FieldDescriptor, path: str, parent: str, schemas: dict[str, Schema]) -> Schema:
    required = field.name in _REQUIRED.get(parent, ())
    schema = _value(field, path, schemas)
    if field.is_repeated:
        schema = {"type": "array", "items": schema, **({"minItems": 1} if required else {})}
    if not required:
        schema = or_null(schema)
    return {"description": DESCRIPTIONS[path], **schema}


def _value(field: FieldDescriptor, path: str, schemas: dict[str, Schema]) -> Schema:
    if field.message_type is not None:
        if field.message_type.full_name == duration_pb2.Duration.DESCRIPTOR.full_name:
            return {"type": "string", "pattern": r"^[0-9]+(\.[0-9]{1,9})?s$"}
        return _add_message(field.message_type, path, schemas)
    schema: Schema
    if field.enum_type is not None:
        return {"type": "string", "enum": [*(value.name for value in field.enum_type.values), ""]}
    if field.cpp_type in _INTEGERS:
        schema = {"type": "integer", "format": _INTEGERS[field.cpp_type]}
    elif field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        schema = {"type": "number", "format": "double"}
    else:
        schema = {"type": "boolean" if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else "string"}
    if path in _RANGES:
        schema["minimum"], schema["maximum"] = _RANGES[path]
    schema.update(_KEYWORDS.get(path, {}))
    if path in _ONLY:
        schema["enum"] = _ONLY[path]
    return schema


def _paths() -> dict[str, Any]:
    request_id = _parameter("request_id", "As `/v1/inference` answered it.")
    index = _parameter("prompt_index", "Index of the prompt, from 0.")
    body = {"required": True, "content": {JSON: {"schema": ref("Request")}}}
    image: Schema = {
        "description": "The image.",
        "content": {f"image/{kind}": {} for kind in ("jpeg", "png", "webp")},
    }
    return {
        "/v1/inference": {
            "post": {
                "operationId": "submitInference",
                "summary": "Queues a generation",
                "requestBody": body,
                "responses": _responses(_json("Submitted"), 400, 401, 409, 413, 415, 422, 429, 503),
            }
        },
        "/v1/requests/{request_id}/status": _get(
            "getInferenceStatus", "Tells how far it is", _json("Status"), 401, 404, 503, parameters=[request_id]
        ),
        "/v1/requests/{request_id}/result": _get(
            "getInferenceResult", "Tells what came of it", _json("Result"), 401, 404, 503, parameters=[request_id]
        ),
        "/v1/requests/{request_id}/images/{prompt_index}": _get(
            "downloadInferenceImage", "Sends an image", image, 401, 404, 503, parameters=[request_id, index]
        ),
        "/v1/models": _get("listInferenceModels", "Lists the models", _json("Models"), 401, 503),
        "/health": _get("getInferenceHealth", "Tells whether requests are taken", _json("Health"), 401, 503),
        "/openapi.json": {
            "get": {
                "operationId": "getDescription",
                "summary": "This document",
                "security": [],
                "responses": {"200": {"description": "It.", "content": {JSON: {"schema": {"type": "object"}}}}},
            }
        },
    }


_ERRORS: Final = {
    400: "The model is not known, or an adapter cannot be found or used.",
    401: "A token is wanted.",
    404: "There is no such request, or not yet such an image.",
    409: "Another request was made under this `request_id`.",
    413: "The body is larger than 1 MiB.",
    415: "The body is no JSON.",
    422: "Fields are wrong: `details.violations` lists them.",
    429: "The queue is full, or the caller's quota: `retry-after` says when to come back.",
    503: "The server is starting, stopping or down.",
}


def _responses(done: Schema, *errors: int) -> dict[str, Schema]:
    told = {str(status): {"description": _ERRORS[status], **_content("Error")} for status in errors}
    return {"200": done, **told, "default": {"description": "Any other error.", **_content("Error")}}


def _get(name: str, summary: str, done: Schema, *errors: int, parameters: list[Schema] | None = None) -> Schema:
    operation: Schema = {"operationId": name, "summary": summary, "responses": _responses(done, *errors)}
    if parameters:
        operation["parameters"] = parameters
    return {"get": operation}


def _parameter(name: str, description: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": {"type": "string"}}


def _json(name: str) -> Schema:
    return {"description": "Done.", **_content(name)}


def _content(name: str) -> Schema:
    return {"content": {JSON: {"schema": ref(name)}}}
