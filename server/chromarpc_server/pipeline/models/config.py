"""Sizes of a Chroma transformer, and how they are read off a checkpoint's tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from chromarpc_server.domain.errors import WeightsInvalid

FLUX_AXES = (16, 56, 56)
MAX_BLOCKS = 256
"""Of one kind."""
MAX_CHANNELS = 2**16
"""Of a layer: tensors of nothing may claim any number of rows."""


@dataclass(frozen=True)
class ChromaConfig:
    """Sizes of a Chroma transformer, named as in the reference."""

    in_channels: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    """Double blocks: text and image in separate streams."""
    depth_single_blocks: int
    axes_dim: tuple[int, int, int]
    """RoPE channels of (text, row, column); they add up to the head size."""
    theta: int
    approximator_in_dim: int
    approximator_depth: int
    approximator_hidden_size: int

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def modulation_slots(self) -> int:
        """Vectors the approximator makes for one timestep."""
        return 3 * self.depth_single_blocks + 12 * self.depth + 2

    def to_json(self) -> str:
        """As a checkpoint's header metadata holds it, under `config`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
    ) -> ChromaConfig:
        """Reads the sizes off a checkpoint's tensor names and shapes.

        Block counts and widths come from the tensors. The split of the head over the RoPE axes cannot be seen in
        them: it is Flux's for heads of 128, and else read from `metadata["config"]`.

        Raises:
            WeightsInvalid: another model, or tensors missing.
        """
        if "__x0__" in shapes or any(key.startswith(("nerf_", "img_in_patch")) for key in shapes):
            raise WeightsInvalid(
                "a pixel-space checkpoint (Chroma Radiance or x0 prediction), which is another model"
            )
        try:
            hidden, in_channels = shapes["img_in.weight"]
            context = shapes["txt_in.weight"][1]
            head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
            mlp = shapes["double_blocks.0.img_mlp.0.weight"][0]
            approximator_hidden, approximator_in = shapes["distilled_guidance_layer.in_proj.weight"]
        except KeyError as error:
            raise WeightsInvalid(f"not a Chroma checkpoint: it has no tensor {error}") from None
        except (IndexError, ValueError):
            raise WeightsInvalid("not a Chroma checkpoint: its tensors have other dimensions") from None
        if not (hidden and head_dim) or hidden % head_dim:
            raise WeightsInvalid(f"{hidden} channels do not make heads of {head_dim}")
        channels = (hidden, in_channels, context, mlp, approximator_hidden, approximator_in)
        if not all(0 < count <= MAX_CHANNELS for count in channels):
            raise WeightsInvalid(
                f"not a Chroma checkpoint: its layers have {min(channels)} to {max(channels)} channels"
            )
        axes, theta = _axes(head_dim, metadata or {})
        return cls(
            in_channels=in_channels,
            context_in_dim=context,
            hidden_size=hidden,
            mlp_ratio=mlp / hidden,
            num_heads=hidden // head_dim,
            depth=_count(shapes, "double_blocks"),
            depth_single_blocks=_count(shapes, "single_blocks"),
            axes_dim=axes,
            theta=theta,
            approximator_in_dim=approximator_in,
            approximator_depth=_count(shapes, "distilled_guidance_layer.layers"),
            approximator_hidden_size=approximator_hidden,
        )


def _axes(head_dim: int, metadata: Mapping[str, str]) -> tuple[tuple[int, int, int], int]:
    axes: Sequence[int] = FLUX_AXES
    theta = 10_000
    if "config" in metadata:
        try:
            config = json.loads(metadata["config"])
            axes = [int(axis) for axis in config.get("axes_dim", axes)]
            theta = int(config.get("theta", theta))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            raise WeightsInvalid("the checkpoint's header has a `config` that cannot be read") from None
    if len(axes) != 3 or sum(axes) != head_dim or any(axis <= 0 or axis % 2 for axis in axes):
        raise WeightsInvalid(f"RoPE axes {tuple(axes)} do not add up to a head of {head_dim} channels")
    return (axes[0], axes[1], axes[2]), theta


def _count(shapes: Mapping[str, Sequence[int]], prefix: str) -> int:
    """How many of one kind there are: every number from 0, so that a name alone makes no thousand of them."""
    found = (re.match(rf"{re.escape(prefix)}\.([0-9]{{1,6}})\.", key) for key in shapes)
    numbers = {int(match.group(1)) for match in found if match}
    missing = next((number for number in range(len(numbers)) if number not in numbers), None)
    if missing is not None:
        raise WeightsInvalid(f"it has no tensor of {prefix}.{missing}, and has some of {prefix}.{max(numbers)}")
    if len(numbers) > MAX_BLOCKS:
        raise WeightsInvalid(f"{len(numbers)} {prefix}, more than {MAX_BLOCKS}")
    return len(numbers)
