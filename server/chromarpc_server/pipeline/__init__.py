"""Chroma's numerics: weights, adapters, text, denoising, pixels.

The front door is `Checkpoint.load(…)`, `.allocate(profile)`, whose result switches adapters, and `.pipeline(…)`,
whose result draws.
Knows torch and the plan's values; knows no queue and no wire.
"""

from chromarpc_server.pipeline.adapters import Adapter, read_adapter
from chromarpc_server.pipeline.checkpoint import Checkpoint
from chromarpc_server.pipeline.denoising import SamplingChoice
from chromarpc_server.pipeline.device import (
    DeviceChoice,
    choose_device,
    choose_devices,
    compute_with,
    cpu_threads,
    describe_device,
    idle_gpus,
    library_versions,
    peak_memory_bytes,
    probe_device,
    release_memory,
    reset_peak_memory,
    select_device,
    synchronize,
    usable_memory_bytes,
    used_memory_bytes,
)
from chromarpc_server.pipeline.libraries import import_ahead
from chromarpc_server.pipeline.memory_errors import forget_frames, lacks_host_memory, translate_memory_error
from chromarpc_server.pipeline.merged_transformer import AdapterSet, PreparedTransformer, SwitchReport
from chromarpc_server.pipeline.models.text_encoder import PromptEmbedding, TokenizedPrompt
from chromarpc_server.pipeline.pacing import finished_steps
from chromarpc_server.pipeline.pair import Transformer, TransformerPair
from chromarpc_server.pipeline.pipeline import Pipeline
from chromarpc_server.pipeline.profiles import PROFILES, TRAINER_CHOICES, NumericsProfile, served_profiles
from chromarpc_server.pipeline.progress import SILENT, Check, LoadContext, LoadProgress
from chromarpc_server.pipeline.samplers import NotComputable
from chromarpc_server.pipeline.sampling import DenoiseStep, image_tokens
from chromarpc_server.pipeline.trainer.paths import lies_beside
from chromarpc_server.pipeline.weights.reading import CheckpointFiles
from chromarpc_server.pipeline.weights.shared import WeightFiles

__all__ = [
    "PROFILES",
    "SILENT",
    "TRAINER_CHOICES",
    "Adapter",
    "AdapterSet",
    "Check",
    "Checkpoint",
    "CheckpointFiles",
    "DenoiseStep",
    "DeviceChoice",
    "LoadContext",
    "LoadProgress",
    "NotComputable",
    "NumericsProfile",
    "Pipeline",
    "PreparedTransformer",
    "PromptEmbedding",
    "SamplingChoice",
    "SwitchReport",
    "TokenizedPrompt",
    "Transformer",
    "TransformerPair",
    "WeightFiles",
    "choose_device",
    "choose_devices",
    "compute_with",
    "cpu_threads",
    "describe_device",
    "finished_steps",
    "forget_frames",
    "idle_gpus",
    "image_tokens",
    "import_ahead",
    "lacks_host_memory",
    "library_versions",
    "lies_beside",
    "peak_memory_bytes",
    "probe_device",
    "read_adapter",
    "release_memory",
    "reset_peak_memory",
    "select_device",
    "served_profiles",
    "synchronize",
    "translate_memory_error",
    "usable_memory_bytes",
    "used_memory_bytes",
]
