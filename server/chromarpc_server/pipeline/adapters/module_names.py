"""What trainers call the transformer's modules, and where each name lies in the native weights.

Native names are the checkpoint's, with q, k, v fused into `qkv` and q, k, v, mlp into `linear1`. diffusers splits
those into modules of their own, OneTrainer's OMI names number the slices; both come out here as rows of a fused
weight. Sources: diffusers' `convert_chroma_transformer_checkpoint_to_diffusers`, OneTrainer's
`convert_chroma_lora.py`, ComfyUI's `lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from chromarpc_server.pipeline.adapters.change import Shape

_NATIVE, _DIFFUSERS, _OMI = "native", "diffusers", "OMI"

_DOTTED = {
    "diffusion_model.": "ai-toolkit",
    "model.diffusion_model.": "native",
    "transformer.": "diffusers",
    "lora_transformer.": "OneTrainer",
    "base_model.model.": "PEFT",
    "base_model.model.transformer.": "PEFT",
    "": "native",
}
_JOINED = {
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}

_SIMPLE = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("final_layer.linear", "proj_out"),
)
_APPROXIMATOR = (("in_layer", "linear_1"), ("out_layer", "linear_2"))
_DOUBLE = (
    ("img_attn.proj", "attn.to_out.0"),
    ("img_attn.proj", "attn.to_out"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
)
_SINGLE = (("linear2", "proj_out"), ("norm.query_norm", "attn.norm_q"), ("norm.key_norm", "attn.norm_k"))
_SLICES = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


@dataclass(frozen=True)
class Place:
    """Where a file's module lies in the native weights."""

    module: str
    """Native module, or the parameter itself."""
    rows: tuple[int, int] | None
    """First row and the row after the last; None for all."""
    naming: str
    """Whose spelling it was."""

    def parameter(self, what: str, targets: Mapping[str, Shape]) -> str | None:
        """The parameter that its `weight` or `bias` is; RMSNorms call theirs `scale`."""
        candidates = (
            (f"{self.module}.bias",) if what == "bias" else (f"{self.module}.weight", f"{self.module}.scale")
        )
        return next((name for name in candidates if name in targets), None)

    def shape(self, parameter: str, targets: Mapping[str, Shape]) -> Shape:
        """Shape of its rows of a parameter."""
        whole = tuple(targets[parameter])
        return whole if self.rows is None else (self.rows[1] - self.rows[0], *whole[1:])


def places(targets: Mapping[str, Shape]) -> dict[str, Place]:
    """Every spelling of every module of this model, prefix included, to its place."""
    found: dict[str, Place] = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in targets):
        weight = f"{module}.weight"
        for style, name, rows in _spellings(module, tuple(targets.get(weight, ()))):
            for prefix, naming in _DOTTED.items():
                found.setdefault(prefix + name, Place(module, rows, _label(prefix, naming, style)))
            if style != _OMI:
                for prefix, naming in _JOINED.items():
                    found.setdefault(prefix + name.replace(".", "_"), Place(module, rows, naming))
    return found


def _label(prefix: str, naming: str, style: str) -> str:
    if style == _DIFFUSERS and naming in ("native", "ai-toolkit"):
        return "diffusers"
    return "OneTrainer" if prefix == "transformer." and style != _DIFFUSERS else naming


def _spellings(module: str, weight: Shape) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """(style, name, rows) of everything a native module is called."""
    yield _NATIVE, module, None
    for native, name in _SIMPLE:
        if module == native:
            yield _DIFFUSERS, name, None
    if module == "img_in":
        yield _OMI, "img_in.proj", None
    matched = re.fullmatch(
        r"(distilled_guidance_layer|double_blocks|single_blocks)(?:\.layers)?\.(\d+)\.(.+)", module
    )
    if matched is None:
        return
    family, index, inner = matched.groups()
    block, names = {
        "distilled_guidance_layer": ("distilled_guidance_layer.layers", _APPROXIMATOR),
        "double_blocks": ("transformer_blocks", _DOUBLE),
        "single_blocks": ("single_transformer_blocks", _SINGLE),
    }[family]
    for native, name in names:
        if inner == native:
            yield _DIFFUSERS, f"{block}.{index}.{name}", None
    if inner in _SLICES and len(weight) == 2:
        width = weight[0] // 3 if inner.endswith("qkv") else weight[1]
        if inner == "linear1":
            yield _NATIVE, f"{module}_qkv", (0, 3 * width)
        for part, name in enumerate(_SLICES[inner]):
            rows = (part * width, (part + 1) * width if part < 3 else weight[0])
            yield _DIFFUSERS, f"{block}.{index}.{name}", rows
            yield _OMI, f"{module}.{part}", rows
