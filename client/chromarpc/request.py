"""Plain Python arguments to a request message, named as in the schema; what is left out stays out.

Which values are served is the server's to say; here only what cannot be written into the message is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, TypeAlias, TypedDict, TypeVar

from google.protobuf.message import Message

from chromarpc.errors import invalid_request
from chromarpc.events import ImageFormat, LokrForm, NoiseDraw, TrainerOptions
from chromarpc.v1 import generation_service_pb2, options_pb2

DEFAULT_MODEL: Final = "chroma"
"""The model of calls that name none."""

_Key = TypeVar("_Key", bound=str)
_Value = TypeVar("_Value")
_FORMATS: Final[dict[ImageFormat, options_pb2.ImageFormat.ValueType]] = {
    "png": options_pb2.IMAGE_FORMAT_PNG,
    "jpeg": options_pb2.IMAGE_FORMAT_JPEG,
    "webp": options_pb2.IMAGE_FORMAT_WEBP,
    "jpeg-trainer": options_pb2.IMAGE_FORMAT_JPEG_TRAINER,
}
_NOISE_DRAWS: Final[dict[NoiseDraw, options_pb2.NoiseDraw.ValueType]] = {
    "float32": options_pb2.NOISE_DRAW_FLOAT32,
    "legacy": options_pb2.NOISE_DRAW_LEGACY,
}
_LOKR_FORMS: Final[dict[LokrForm, options_pb2.LokrForm.ValueType]] = {
    "factorized": options_pb2.LOKR_FORM_FACTORIZED,
    "weight": options_pb2.LOKR_FORM_WEIGHT,
}


@dataclass(frozen=True)
class Lora:
    """An adapter, by its path below the server's adapter root."""

    path: str
    network_multiplier: float | None = None
    """Strength, -2 to 2; the server's default (1.0) when None."""
    expected_sha256: str | None = None
    """What the file must be, hexadecimal; `LoraContentChanged` where it is another."""


@dataclass(frozen=True)
class Prompt:
    """One image to draw; None takes the call's argument, and without one the model's default."""

    prompt: str
    """`[trigger]` in it is replaced by the trigger word."""
    trigger_word: str | None = None
    width: int | None = None
    """Pixels, 64 to 4096, floored to a multiple of 32; 1 to 4096 and 16 in the trainer's profiles."""
    height: int | None = None
    """Pixels, as the width."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 0 to 20."""
    sample_steps: int | None = None
    """Denoising steps, 1 to 150."""
    seed: int | None = None
    """-1 draws one; 42 plus the prompt's index where nobody says."""
    neg: str | None = None
    """Negative prompt: honoured with `use_neg` and in the trainer's profiles, else answered by a warning."""
    sampler: str | None = None
    """As `server_info` lists them."""
    schedule: str | None = None
    """As `server_info` lists them."""
    shift: float | None = None
    """Fixed shift of the schedule, 0.01 to 100. When left out, the model's default where
    `schedule` is left out too, else the schedule's own."""
    use_neg: bool | None = None
    """Makes `neg` the unconditional text, in every profile."""


PromptLike: TypeAlias = str | Prompt
"""A prompt, or just its text."""
LoraLike: TypeAlias = str | os.PathLike[str] | Lora
"""An adapter, or just its path."""


class GenerateOptions(TypedDict, total=False):
    """What a generation may be told besides its prompts; everything has a default.

    `width`, `height`, `guidance_scale`, `sample_steps`, `seed`, `neg`, `use_neg`, `sampler`, `schedule` and
    `shift` are for every prompt that does not say otherwise itself.
    """

    model: str
    """Id of the model, as `list_models` names them; `chroma` when left out."""
    loras: LoraLike | Sequence[LoraLike]
    """Adapters, applied in this order; the bare model without."""
    trigger_word: str | None
    """Replaces `[trigger]` in every prompt that has no trigger word of its own."""
    width: int | None
    """Pixels, 64 to 4096."""
    height: int | None
    """Pixels, 64 to 4096."""
    guidance_scale: float | None
    """Classifier-free guidance, 0 to 20."""
    sample_steps: int | None
    """Denoising steps, 1 to 150."""
    seed: int | None
    """The same for every such prompt; -1 draws one for each; 42 plus the prompt's index when left out."""
    neg: str | None
    """Negative prompt; honoured with `use_neg` and in the trainer's profiles, else answered by a warning."""
    use_neg: bool | None
    """Makes `neg` the unconditional text, in every profile."""
    sampler: str | None
    """As `server_info` lists them; the model's default when left out."""
    schedule: str | None
    """As `server_info` lists them; the model's default when left out."""
    shift: float | None
    """Fixed shift of the schedule; 1 shifts nothing. When left out, the model's default where `schedule` is left
    out too, else the schedule's own."""
    settings: str | None
    """Whose way of drawing is followed where programs differ: `reference` (when left out) or `comfyui`."""
    profile: str | None
    """Numerics profile, as `server_info` names them."""
    noise_draw: NoiseDraw | None
    """What a seed means."""
    output_format: ImageFormat | None
    """How images are encoded; PNG when left out."""
    output_quality: int | None
    """Of JPEG and WebP, 1 to 100; 95 when left out."""
    picture_record: bool | None
    """Whether each picture carries what it was drawn with; true when left out, but for `jpeg-trainer`."""
    trainer: TrainerOptions | None
    """What the trainer's config decides; other profiles than the trainer's answer it by a warning."""
    preview_every: int
    """A preview after every so many steps; 0 sends none."""
    preview_max_side_px: int | None
    """Longer side of a preview, 16 to 512; 256 when left out."""
    hf_token: str | None
    """Hugging Face token for adapters that need one."""
    request_id: str | None
    """A UUID under which the same request may be made again, and finds the same job; the server keeps that for a
    while when the connection is lost."""
    detach: bool
    """Whether the job goes on when this client goes away. A lost connection is then taken up again."""
    max_queue_s: float | None
    """Seconds that the job may wait in the queue."""


def build_request(
    prompts: PromptLike | Sequence[PromptLike],
    *,
    model: str = DEFAULT_MODEL,
    loras: LoraLike | Sequence[LoraLike] = (),
    trigger_word: str | None = None,
    width: int | None = None,
    height: int | None = None,
    guidance_scale: float | None = None,
    sample_steps: int | None = None,
    seed: int | None = None,
    neg: str | None = None,
    use_neg: bool | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    shift: float | None = None,
    settings: str | None = None,
    profile: str | None = None,
    noise_draw: NoiseDraw | None = None,
    output_format: ImageFormat | None = None,
    output_quality: int | None = None,
    picture_record: bool | None = None,
    trainer: TrainerOptions | None = None,
    preview_every: int = 0,
    preview_max_side_px: int | None = None,
    hf_token: str | None = None,
    request_id: str | None = None,
    detach: bool = False,
    max_queue_s: float | None = None,
) -> generation_service_pb2.GenerateRequest:
    """The message of a generation; the arguments are those of `GenerateOptions`.

    Raises:
        InvalidRequest: a value that the message cannot hold, naming its field.
    """
    shared = {
        "width": width,
        "height": height,
        "guidance_scale": guidance_scale,
        "sample_steps": sample_steps,
        "seed": seed,
        "neg": neg,
        "use_neg": use_neg,
        "sampler": sampler,
        "schedule": schedule,
        "shift": shift,
    }
    request = generation_service_pb2.GenerateRequest()
    _set(request, "", model=model, hf_token=hf_token, trigger_word=trigger_word, profile=profile)
    _set(request, "", request_id=request_id, settings=settings)
    if detach:
        request.on_disconnect = generation_service_pb2.DISCONNECT_POLICY_DETACH
    if max_queue_s is not None:
        try:
            request.max_queue_time.FromNanoseconds(round(max_queue_s * 1e9))
        except (TypeError, ValueError, OverflowError) as error:
            raise invalid_request("max_queue_s", f"cannot be sent: {error}") from None
    for index, given in enumerate([loras] if isinstance(loras, str | os.PathLike | Lora) else loras):
        lora = given if isinstance(given, Lora) else Lora(os.fspath(given))
        _set(request.loras.add(), f"loras.{index}.", **asdict(lora))
    for index, item in enumerate([prompts] if isinstance(prompts, str | Prompt) else prompts):
        own = asdict(item if isinstance(item, Prompt) else Prompt(item))
        said = {name: value for name, value in own.items() if value is not None}
        _set(request.prompts.add(), f"prompts.{index}.", **{**shared, **said})
    if output_format is not None:
        request.output.format = _choice("output.format", output_format, _FORMATS)
    if output_quality is not None:
        _set(request.output, "output.", quality=output_quality)
    if picture_record is not None:
        _set(request.output, "output.", picture_record=picture_record)
    if trainer is not None:
        _set_trainer(request.trainer, trainer)
    if preview_every or preview_max_side_px is not None:
        _set(request.preview, "preview.", every_n_steps=preview_every, max_side_px=preview_max_side_px)
    if noise_draw is not None:
        request.noise_draw = _choice("noise_draw", noise_draw, _NOISE_DRAWS)
    return request


def _set_trainer(message: options_pb2.TrainerOptions, trainer: TrainerOptions) -> None:
    message.SetInParent()
    said = asdict(trainer)
    if trainer.lokr_form is not None:
        said["lokr_form"] = _choice("trainer.lokr_form", trainer.lokr_form, _LOKR_FORMS)
    _set(message, "trainer.", **said)


def _set(message: Message, at: str, **values: object) -> None:
    for name, value in values.items():
        if value is None:
            continue
        try:
            setattr(message, name, value)
        except (TypeError, ValueError) as error:
            raise invalid_request(f"{at}{name}", f"cannot be sent: {error}") from None


def _choice(at: str, value: _Key, choices: Mapping[_Key, _Value]) -> _Value:
    try:
        return choices[value]
    except KeyError:
        raise invalid_request(at, f"must be one of {', '.join(choices)}, got {value!r}") from None
