"""What the HTTP API answers with, as schemas: `transport/messages/http_bodies.py` writes these bodies."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def answer_schemas() -> dict[str, Schema]:
    """The bodies of answers and what is in them, by name."""
    words: Schema = {"type": "string"}
    count: Schema = {"type": "integer", "minimum": 0}
    seconds: Schema = {"type": "number", "minimum": 0}
    time: Schema = {"type": "string", "format": "date-time"}
    url: Schema = {"type": "string", "format": "uri-reference"}
    state: Schema = {"type": "string", "enum": ["in_queue", "in_progress", "succeeded", "failed", "canceled"]}
    warnings: Schema = {"type": "array", "items": ref("Warning")}
    failure = {
        "error": {"description": "Why it failed, for people.", **or_null(words)},
        "detail": {"description": "The same in the shape of an error.", **or_null(ref("ErrorDetail"))},
    }
    return {
        "Submitted": _object(
            request_id=words,
            status={"const": "queued"},
            status_url=url,
            result_url=url,
            created_at=time,
            warnings=warnings,
        ),
        "Status": _object(
            request_id=words,
            status=state,
            created_at=time,
            started_at=or_null(time),
            finished_at=or_null(time),
            **failure,
            queue_position={"description": "1 is next; null when it does not wait.", **or_null(count)},
            done_steps=count,
            total_steps=count,
        ),
        "Result": _object(
            request_id=words,
            status=state,
            outputs=or_null(ref("Outputs")),
            **failure,
            created_at=time,
            finished_at=or_null(time),
            metadata=or_null(ref("Metadata")),
        ),
        "Outputs": _object(
            images={"type": "array", "items": ref("Image")},
            videos={"type": "array", "maxItems": 0, "items": {}},
        ),
        "Image": _object(
            format={"type": "string", "enum": ["jpeg", "png", "webp"]},
            width=count,
            height=count,
            url=url,
            seed={"type": "integer", "format": "int64"},
            size_bytes=count,
            sha256=words,
        ),
        "Metadata": _object(
            model={"description": "Id of the model that was asked for.", **words},
            inference_time={"description": "Seconds from its start to its end.", **seconds},
            timings={"description": "Seconds.", **_object(queued=seconds, total=seconds)},
            warnings=warnings,
        ),
        "Warning": _object(code=words, field=words, message=words),
        "Models": _object(models={"type": "array", "items": ref("Model")}),
        "Model": _object(
            id=words,
            base_model=words,
            resolution_divisor=count,
            default_steps=count,
            default_guidance_scale={"type": "number"},
            requires_control_image={"const": False},
            is_video_model={"const": False},
            default_num_frames={"type": "null"},
            default_fps={"type": "null"},
        ),
        "Health": _object(status={"const": "healthy"}),
        "Error": _object(detail=ref("ErrorDetail")),
        "ErrorDetail": _object(error=ref("ErrorBody")),
        "ErrorBody": _object(
            code={"description": "Stable name, such as `INVALID_PARAMETER`.", **words},
            message={"description": "For people.", **words},
            details={
                "description": "Further facts for programs.",
                "type": "object",
                "properties": {"violations": {"type": "array", "items": _object(field=words, description=words)}},
            },
        ),
    }


def ref(name: str) -> Schema:
    """A schema of the document, by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def or_null(schema: Schema) -> Schema:
    """The same, or null."""
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    enum = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, "type": [schema["type"], "null"], **enum}


def _object(**properties: Schema) -> Schema:
    """An object whose keys are all there."""
    return {"type": "object", "required": list(properties), "properties": properties}
