"""What `options.proto` defines, to domain values and back: formats, noise, trainer options."""

from __future__ import annotations

from chromarpc.v1 import options_pb2
from chromarpc_server.domain.plan import PlannedOutput
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw, TrainerRequest
from chromarpc_server.domain.trainer import LokrForm, TrainerSettings

IMAGE_FORMATS = {
    options_pb2.IMAGE_FORMAT_PNG: ImageFormat.PNG,
    options_pb2.IMAGE_FORMAT_JPEG: ImageFormat.JPEG,
    options_pb2.IMAGE_FORMAT_WEBP: ImageFormat.WEBP,
    options_pb2.IMAGE_FORMAT_JPEG_TRAINER: ImageFormat.JPEG_TRAINER,
}
NOISE_DRAWS = {
    options_pb2.NOISE_DRAW_FLOAT32: NoiseDraw.FLOAT32,
    options_pb2.NOISE_DRAW_LEGACY: NoiseDraw.LEGACY,
}
_FORMATS_BACK = {value: key for key, value in IMAGE_FORMATS.items()}
_DRAWS_BACK = {value: key for key, value in NOISE_DRAWS.items()}
_LOKR_FORMS = {
    options_pb2.LOKR_FORM_FACTORIZED: LokrForm.FACTORIZED,
    options_pb2.LOKR_FORM_WEIGHT: LokrForm.WEIGHT,
}
_LOKR_FORMS_BACK = {value: key for key, value in _LOKR_FORMS.items()}
_DTYPES_BACK = {"bfloat16": "bf16", "float32": "float32"}
"""As the config usually spells them."""


def output_message(output: PlannedOutput) -> options_pb2.OutputOptions:
    """How images are encoded, as options that ask for the same again."""
    message = options_pb2.OutputOptions(format=_FORMATS_BACK[output.format])
    if output.format not in (ImageFormat.PNG, ImageFormat.JPEG_TRAINER):
        message.quality = output.quality
    message.picture_record = output.picture_record
    return message


def noise_draw_message(noise_draw: NoiseDraw) -> options_pb2.NoiseDraw.ValueType:
    """What a seed means."""
    return _DRAWS_BACK[noise_draw]


def trainer_request(message: options_pb2.TrainerOptions) -> TrainerRequest:
    """The options as a domain value; what was left out, and a form that nobody here knows, is None."""
    return TrainerRequest(
        quantize=message.quantize if message.HasField("quantize") else None,
        qtype=message.qtype if message.HasField("qtype") else None,
        quantize_te=message.quantize_te if message.HasField("quantize_te") else None,
        dtype=message.dtype if message.HasField("dtype") else None,
        lokr_form=_LOKR_FORMS.get(message.lokr_form),
    )


def trainer_message(settings: TrainerSettings) -> options_pb2.TrainerOptions:
    """The settings as a message that gives the same ones again."""
    return options_pb2.TrainerOptions(
        quantize=settings.quantize,
        qtype=settings.qtype,
        quantize_te=settings.quantize_te,
        dtype=_DTYPES_BACK[settings.dtype],
        lokr_form=_LOKR_FORMS_BACK[settings.lokr_form],
    )
