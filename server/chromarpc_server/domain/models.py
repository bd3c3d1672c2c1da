"""Which models exist: ids, where their weights come from, and what their options default to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class ModelDefaults:
    """What is filled in for what a request leaves out."""

    width: int = 1024
    height: int = 1024
    sample_steps: int = 25
    guidance_scale: float = 4.0
    seed: int = 42
    """Of the first prompt; each further one adds its index."""
    network_multiplier: float = 1.0


@dataclass(frozen=True)
class HubSource:
    """Weights that live on the Hugging Face hub."""

    transformer_repo: str
    transformer_file: str
    extras_repo: str
    """Holds `text_encoder_2/`, `tokenizer_2/` and `vae/`."""


@dataclass(frozen=True)
class BundledSource:
    """Weights that ship inside the server package, as a folder below `assets/`."""

    folder: str
    transformer_file: str


@dataclass(frozen=True)
class ModelSpec:
    """One model that requests can name."""

    id: str
    description: str
    source: HubSource | BundledSource
    defaults: ModelDefaults = ModelDefaults()
    resolution_divisor: int = 32

    @property
    def base_checkpoint(self) -> str:
        """Where the transformer's weights come from, for people."""
        match self.source:
            case HubSource(transformer_repo=repo):
                return repo
            case BundledSource(folder=folder):
                return f"bundled:{folder}"


STREAMED_PROFILES = ("reference", "fp8")
"""Numerics profiles that are served where blocks are streamed."""


@dataclass(frozen=True)
class MemoryPlan:
    """What of a checkpoint stays where on a GPU."""

    weights: Literal["dequantized", "float8"]
    """Of the `reference` profile; float8 takes half the memory and gives the same bits, a little slower."""
    text_encoder: Literal["device", "host"]
    """`host`: its layers are copied over one by one for every prompt."""
    master: Literal["device", "host", "mapped"]
    """The weights that adapters are merged into; `host`: in page-locked memory; `mapped`: in their file, because
    that was too much for the host. Switching takes longer then."""
    tile_autoencoder: bool
    """Images are decoded in tiles, which changes pixels a little."""
    record_graphs: bool
    """Steps are recorded as CUDA graphs."""
    trainer_text_encoder: Literal["device", "host"] = "host"
    """The preview profiles' own text encoder; one that turns out larger than planned may go to the host, too."""
    estimated_bytes: int = 0
    """What all of it takes at most, for images up to 1024×1024."""
    usable_bytes: int = 0
    """What it was planned for."""
    streamed_blocks: int = 0
    """Of the transformer's blocks: those that lie in host memory and are copied to the device in every step."""
    host_bytes: int = 0
    """Of page-locked host memory."""
    host_available_bytes: int = 0
    """What the host had free for that; 0 where nobody knows."""

    def withholds(self, profile: str) -> str:
        """Why a numerics profile is not served; empty where it is."""
        if not self.streamed_blocks or profile in STREAMED_PROFILES:
            return ""
        return (
            f"the profile {profile} needs the whole transformer on the device, whose memory is too small for it: "
            f"{self.streamed_blocks} of its blocks are streamed; ask for {' or '.join(STREAMED_PROFILES)}, or close "
            "what else holds the device's memory"
        )


IGNORED_OPTIONS = ("prompts.neg", "prompts.fps")
"""Accepted because the reference accepts them, without effect on Chroma; answered by a warning."""

REFUSED_OPTIONS = (
    "kv_cache",
    "match_target_res",
    "loras.transformer",
    "prompts.sampler",
    "prompts.num_frames",
    "prompts.resolution",
    "prompts.ctrl_img",
    "prompts.ctrl_img_1",
    "prompts.ctrl_img_2",
    "prompts.ctrl_img_3",
)
"""Refused unless they hold the value that means nothing, because Chroma cannot honour them."""

CHROMA = ModelSpec(
    id="chroma",
    description="Chroma1-Base, 8.9 billion parameters",
    source=HubSource(
        transformer_repo="lodestones/Chroma1-Base",
        transformer_file="Chroma1-Base.safetensors",
        extras_repo="ostris/Flex.1-alpha",
    ),
)

CHROMA_MINI = ModelSpec(
    id="chroma-mini",
    description="A bundled miniature of Chroma that draws coloured shapes, for demos, tests and front ends",
    source=BundledSource(folder="chroma_mini", transformer_file="chroma-mini.safetensors"),
    defaults=ModelDefaults(width=256, height=256),
)

REGISTRY: Mapping[str, ModelSpec] = MappingProxyType({spec.id: spec for spec in (CHROMA, CHROMA_MINI)})
