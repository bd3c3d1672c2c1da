"""A request's message to the domain's value: nothing is checked, nothing filled in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from google.protobuf import unknown_fields
from google.protobuf.message import Message

from chromarpc.v1 import generation_service_pb2, options_pb2
from chromarpc_server.domain.requests import (
    GenerationRequest,
    LoraRequest,
    OutputRequest,
    PreviewRequest,
    PromptRequest,
)
from chromarpc_server.transport.messages.options import IMAGE_FORMATS, NOISE_DRAWS, trainer_request
from chromarpc_server.transport.messages.values import seconds

MAX_UNKNOWN_FIELDS = 100
_PLAIN_FIELDS = (
    "model",
    "hf_token",
    "trigger_word",
    "kv_cache",
    "match_target_res",
    "profile",
    "request_id",
    "settings",
)


def generation_request(message: generation_service_pb2.GenerateRequest) -> GenerationRequest:
    """The request; what was left out stays out, and names of fields and values that are not known are kept."""
    unknown = [*itertools.islice(_unknown_fields(message, ""), MAX_UNKNOWN_FIELDS), *_unknown_values(message)]
    return GenerationRequest(
        **_set_fields(message, *_PLAIN_FIELDS),  # type: ignore[arg-type]
        loras=tuple(
            LoraRequest(**_set_fields(lora, "path", "transformer", "network_multiplier", "expected_sha256"))  # type: ignore[arg-type]
            for lora in message.loras
        ),
        prompts=tuple(_prompt(prompt) for prompt in message.prompts),
        output=OutputRequest(
            format=IMAGE_FORMATS.get(message.output.format),
            **_set_fields(message.output, "quality", "picture_record"),  # type: ignore[arg-type]
        ),
        preview=PreviewRequest(
            every_n_steps=message.preview.every_n_steps,
            **_set_fields(message.preview, "max_side_px"),  # type: ignore[arg-type]
        ),
        noise_draw=NOISE_DRAWS.get(message.noise_draw),
        detach=message.on_disconnect == generation_service_pb2.DISCONNECT_POLICY_DETACH,
        cancel_at_once=message.on_disconnect == generation_service_pb2.DISCONNECT_POLICY_CANCEL,
        max_queue_s=seconds(message.max_queue_time) if message.HasField("max_queue_time") else None,
        trainer=trainer_request(message.trainer) if message.HasField("trainer") else None,
        unknown_fields=tuple(unknown),
    )


def _prompt(message: generation_service_pb2.Prompt) -> PromptRequest:
    names = [field.name for field in message.DESCRIPTOR.fields]
    return PromptRequest(**_set_fields(message, *names))  # type: ignore[arg-type]


def _set_fields(message: Message, *names: str) -> dict[str, object]:
    """The fields of `names` that were set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _unknown_fields(message: Message, at: str) -> Iterator[str]:
    """Paths of the fields, at any depth, that this version of the contract does not have."""
    for field in unknown_fields.UnknownFieldSet(message):  # type: ignore[attr-defined]
        yield f"{at}field {field.field_number}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        name = f"{at}{descriptor.name}"
        if descriptor.is_repeated:
            for index, item in enumerate(value):
                yield from _unknown_fields(item, f"{name}.{index}.")
        else:
            yield from _unknown_fields(value, f"{name}.")


def _unknown_values(message: generation_service_pb2.GenerateRequest) -> Iterator[str]:
    """Fields whose value this version of the contract does not have."""
    if message.output.format and message.output.format not in IMAGE_FORMATS:
        yield "output.format"
    if message.noise_draw and message.noise_draw not in NOISE_DRAWS:
        yield "noise_draw"
    if message.on_disconnect not in generation_service_pb2.DisconnectPolicy.values():
        yield "on_disconnect"
    if message.trainer.lokr_form not in options_pb2.LokrForm.values():
        yield "trainer.lokr_form"
