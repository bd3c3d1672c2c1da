"""Which models exist: ids, where their parts come from, and what their options default to.

A server's models are the built-in ones (`REGISTRY`), those of its settings, and those of a ComfyUI folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Literal

MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""What a model may be called."""
HUB_REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?::(?P<path>[\w.+ -]+(?:/[\w.+ -]+)*))?"
)
"""`owner/name` or `owner/name:file` of the Hugging Face hub."""
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".gguf")
"""How files of weights are named; what one is its content says."""
FILE_SUFFIXES = (*WEIGHT_SUFFIXES, ".json")


class ModelPart(StrEnum):
    """What a model is made of."""

    TRANSFORMER = "transformer"
    TEXT_ENCODER = "text_encoder"
    TOKENIZER = "tokenizer"
    AUTOENCODER = "autoencoder"


@dataclass(frozen=True)
class HubPart:
    """A part on the Hugging Face hub."""

    repo: str
    path: str = ""
    """The file or folder in it; empty where the part is the whole repository."""

    @property
    def is_file(self) -> bool:
        """Whether it is a single file, and no folder."""
        return self.path.endswith(FILE_SUFFIXES)

    def __str__(self) -> str:
        """As settings name it."""
        return f"{self.repo}:{self.path}" if self.path else self.repo


@dataclass(frozen=True)
class LocalPart:
    """A part that is a file or a folder on the machine whose devices draw with it."""

    path: Path

    def __str__(self) -> str:
        """For clients: the folders that it lies in are the server's own business."""
        return self.path.name


@dataclass(frozen=True)
class BundledPart:
    """A part that ships inside the server package: a file or a folder below `assets/`."""

    path: str

    def __str__(self) -> str:
        """For people."""
        return f"bundled:{self.path}"


PartSource = HubPart | LocalPart | BundledPart


def hub_part(text: str) -> HubPart | None:
    """`owner/name` or `owner/name:file`; None where the text is neither."""
    found = HUB_REFERENCE.fullmatch(text)
    if found is None or any(step.strip(".") == "" for step in re.split("[/:]", text)):
        return None
    return HubPart(found["repo"], found["path"] or "")


def trainer_file(repo: str) -> str:
    """The file that a repository of Chroma's author holds, by the rule that the trainer finds it by."""
    return f"{repo.rpartition('/')[2]}.safetensors"


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
    sampler: str = "flowmatch"
    schedule: str = "flowmatch"
    shift: float | None = None
    """Of that schedule, where a request names neither; None: the schedule's own."""
    profile: str = ""
    """Numerics profile; empty: the server's."""


@dataclass(frozen=True)
class ModelSpec:
    """One model that requests can name.

    A part that is None is looked for where the files lie: in the folder that the transformer is given by, or
    inside its file; else it is that of `chroma`, and the tokenizer the one of the text encoder's vocabulary.
    """

    id: str
    description: str
    transformer: PartSource
    text_encoder: PartSource | None = None
    tokenizer: PartSource | None = None
    autoencoder: PartSource | None = None
    base_name: str = ""
    """What adapters trained on it name as their base; ai-toolkit's `name_or_path`."""
    defaults: ModelDefaults = ModelDefaults()
    resolution_divisor: int = 32

    @property
    def base_checkpoint(self) -> str:
        """Where the transformer's weights come from, for people."""
        match self.transformer:
            case HubPart(repo=repo, path=path) if path == trainer_file(repo):
                return repo
            case BundledPart(path=path):
                return f"bundled:{path.partition('/')[0]}"
        return str(self.transformer)

    def source(self, part: ModelPart) -> PartSource | None:
        """Where a part comes from; None where that is looked for."""
        return {
            ModelPart.TRANSFORMER: self.transformer,
            ModelPart.TEXT_ENCODER: self.text_encoder,
            ModelPart.TOKENIZER: self.tokenizer,
            ModelPart.AUTOENCODER: self.autoencoder,
        }[part]


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
            f"{self.streamed_blocks} of its blocks are streamed; ask for {' or '.join(STREAMED_PROFILES)}, or "
            "close what else holds the device's memory"
        )


IGNORED_OPTIONS = ("prompts.fps",)
"""Accepted because the reference accepts them, without effect on Chroma; answered by a warning."""

REFUSED_OPTIONS = (
    "kv_cache",
    "match_target_res",
    "loras.transformer",
    "prompts.num_frames",
    "prompts.resolution",
    "prompts.ctrl_img",
    "prompts.ctrl_img_1",
    "prompts.ctrl_img_2",
    "prompts.ctrl_img_3",
)
"""Refused unless they hold the value that means nothing, because Chroma cannot honour them."""

_EXTRAS_REPO = "ostris/Flex.1-alpha"
STANDARD_TEXT_ENCODER = HubPart(_EXTRAS_REPO, "text_encoder_2")
"""T5 v1.1 XXL, as the trainer takes it."""
STANDARD_AUTOENCODER = HubPart(_EXTRAS_REPO, "vae")
"""Flux's, as the trainer takes it."""
T5_TOKENIZER = BundledPart("t5_tokenizer")
"""Of every text encoder that Chroma was trained with."""

_AS_PEOPLE_RUN_IT = ModelDefaults(sample_steps=26, guidance_scale=3.5, sampler="euler", schedule="beta", shift=1.0)

CHROMA = ModelSpec(
    id="chroma",
    description="Chroma1-Base, 8.9 billion parameters",
    transformer=HubPart("lodestones/Chroma1-Base", "Chroma1-Base.safetensors"),
    text_encoder=STANDARD_TEXT_ENCODER,
    tokenizer=HubPart(_EXTRAS_REPO, "tokenizer_2"),
    autoencoder=STANDARD_AUTOENCODER,
    base_name="lodestones/Chroma1-Base",
)

CHROMA_HD = replace(
    CHROMA,
    id="chroma1-hd",
    description="Chroma1-HD; its defaults are those that people run it with: euler, beta, 26 steps, guidance 3.5",
    transformer=HubPart("lodestones/Chroma1-HD", "Chroma1-HD.safetensors"),
    base_name="lodestones/Chroma1-HD",
    defaults=_AS_PEOPLE_RUN_IT,
)

CHROMA_FLASH = replace(
    CHROMA,
    id="chroma1-flash",
    description="Chroma1-Flash, for few steps; its defaults are those that people run it with: heun, 8 steps, "
    "no guidance",
    transformer=HubPart("lodestones/Chroma1-Flash", "Chroma1-Flash.safetensors"),
    base_name="lodestones/Chroma1-Flash",
    defaults=replace(_AS_PEOPLE_RUN_IT, sample_steps=8, guidance_scale=1.0, sampler="heun"),
)

CHROMA_MINI = ModelSpec(
    id="chroma-mini",
    description="A bundled miniature of Chroma that draws coloured shapes, for demos, tests and front ends",
    transformer=BundledPart("chroma_mini/chroma-mini.safetensors"),
    text_encoder=BundledPart("chroma_mini/text_encoder_2"),
    tokenizer=BundledPart("chroma_mini/tokenizer_2"),
    autoencoder=BundledPart("chroma_mini/vae"),
    base_name="chroma-mini",
    defaults=ModelDefaults(width=256, height=256),
)

REGISTRY: Mapping[str, ModelSpec] = MappingProxyType(
    {spec.id: spec for spec in (CHROMA, CHROMA_HD, CHROMA_FLASH, CHROMA_MINI)}
)
"""The built-in models."""

_TOKENIZERS = ((32_100, T5_TOKENIZER), (388, BundledPart("chroma_mini/tokenizer_2")))
"""Bundled ones by how many pieces they know, the most first."""


def tokenizer_for(vocabulary: int) -> BundledPart | None:
    """The bundled tokenizer of a text encoder that comes without one; None where none is known for it.

    `vocabulary`: rows of its embedding, of which T5 has a few more than pieces.
    """
    if vocabulary >= _TOKENIZERS[0][0]:
        return T5_TOKENIZER
    return next((found for pieces, found in _TOKENIZERS if pieces == vocabulary), None)
