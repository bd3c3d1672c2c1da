"""Text-to-image with Chroma and LoRAs, over gRPC: the client.

    from chromarpc import Client, ImageReady, Step

    with Client("127.0.0.1:50051") as client:
        for event in client.generate("a red circle", loras="my_job/my.safetensors", seed=7):
            match event:
                case Step(step=step, total_steps=total):
                    print(f"{step}/{total}")
                case ImageReady(image=image):
                    image.save("out.png")

`AsyncClient` is the same for asyncio. `generate_images` skips the events and returns the images. Every error
is in `chromarpc.errors`; the messages themselves are in `chromarpc.v1`.
"""

from chromarpc.aio import AsyncClient, AsyncEventStream
from chromarpc.channel import TlsOptions
from chromarpc.client import Client, EventStream
from chromarpc.errors import (
    AccessDenied,
    Cancelled,
    ChromarpcError,
    DeadlineExceeded,
    DeviceLost,
    Draining,
    FailedPrecondition,
    FieldViolation,
    InvalidRequest,
    LoraContentChanged,
    LoraDownloadFailed,
    LoraForbidden,
    LoraIncompatible,
    LoraInvalid,
    LoraNotFound,
    ModelNotFound,
    NotFound,
    OutOfMemory,
    ProtocolError,
    QueueFull,
    QuotaExceeded,
    ResourceExhausted,
    ServerError,
    ServerUnavailable,
    StatusError,
    UploadNotFound,
    UploadOutOfOrder,
    UploadsFull,
    WeightsInvalid,
    WeightsMissing,
)
from chromarpc.events import (
    Accepted,
    AdapterPlacement,
    AdapterReport,
    Completed,
    Event,
    Heartbeat,
    ImageReady,
    JobWarning,
    Loading,
    LoadingStage,
    PlannedLora,
    PlannedPrompt,
    Prepared,
    Preview,
    Queued,
    Restarted,
    Step,
    Timings,
    TokenCount,
    TrainerOptions,
    WeightsReport,
    WeightsSource,
)
from chromarpc.health import HealthStatus
from chromarpc.images import GeneratedImage
from chromarpc.json_request import InvalidRequestJson, ParsedRequest, parse_request_json
from chromarpc.loras import BlockStrength, LoraInspection, LoraList, LoraSource, StoredLora, UnsupportedKeys
from chromarpc.request import GenerateOptions, Lora, Prompt
from chromarpc.version import __version__

__all__ = [
    "Accepted",
    "AccessDenied",
    "AdapterPlacement",
    "AdapterReport",
    "AsyncClient",
    "AsyncEventStream",
    "BlockStrength",
    "Cancelled",
    "ChromarpcError",
    "Client",
    "Completed",
    "DeadlineExceeded",
    "DeviceLost",
    "Draining",
    "Event",
    "EventStream",
    "FailedPrecondition",
    "FieldViolation",
    "GenerateOptions",
    "GeneratedImage",
    "HealthStatus",
    "Heartbeat",
    "ImageReady",
    "InvalidRequest",
    "InvalidRequestJson",
    "JobWarning",
    "Loading",
    "LoadingStage",
    "Lora",
    "LoraContentChanged",
    "LoraDownloadFailed",
    "LoraForbidden",
    "LoraIncompatible",
    "LoraInspection",
    "LoraInvalid",
    "LoraList",
    "LoraNotFound",
    "LoraSource",
    "ModelNotFound",
    "NotFound",
    "OutOfMemory",
    "ParsedRequest",
    "PlannedLora",
    "PlannedPrompt",
    "Prepared",
    "Preview",
    "Prompt",
    "ProtocolError",
    "QueueFull",
    "Queued",
    "QuotaExceeded",
    "ResourceExhausted",
    "Restarted",
    "ServerError",
    "ServerUnavailable",
    "StatusError",
    "Step",
    "StoredLora",
    "Timings",
    "TlsOptions",
    "TokenCount",
    "TrainerOptions",
    "UnsupportedKeys",
    "UploadNotFound",
    "UploadOutOfOrder",
    "UploadsFull",
    "WeightsInvalid",
    "WeightsMissing",
    "WeightsReport",
    "WeightsSource",
    "__version__",
    "parse_request_json",
]
