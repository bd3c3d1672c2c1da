"""What files of weights may be: a row for each architecture and way to store, with names of tensors that tell it.

People have hundreds of checkpoints in one folder, and names of files lie. A row may go wrong in one way only: a
file that it takes for another is refused, and says so; no tensor is ever read on a row's word.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.")
"""What other programs write before the names of a transformer."""


class Header:
    """A header as the rows ask it: names with every block's number as 0, and without a known prefix."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.names = {_unnumbered(name) for name in shapes}
        for prefix in PREFIXES:
            self.names |= {name.removeprefix(prefix) for name in tuple(self.names) if name.startswith(prefix)}
        self.ends = {end for name in self.names for end in _ends(name)}
        self._sorted = sorted(self.names)

    def has(self, *names: str) -> bool:
        """Whether every one of these is there."""
        return all(_unnumbered(name) in self.names for name in names)

    def ends_with(self, *ends: str) -> bool:
        """Whether a name has one of these as its last parts, whatever is before them."""
        return any(end in self.ends for end in ends)

    def begins_with(self, *starts: str) -> bool:
        """Whether a name begins with one of these."""
        places = ((bisect_left(self._sorted, start), start) for start in starts)
        return any(self._sorted[place].startswith(start) for place, start in places if place < len(self._sorted))


def _unnumbered(name: str) -> str:
    """A name with every number between its dots as 0: what one block has, all have."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "0", name)


def _ends(name: str) -> Iterable[str]:
    """A name's last part, its last two, up to four."""
    parts = name.split(".")
    return (".".join(parts[-count:]) for count in range(1, min(4, len(parts)) + 1))


@dataclass(frozen=True)
class Known:
    """Something that a file may be."""

    what: str
    """After "this is"."""
    is_it: Callable[[Header], bool]


def _approximator(header: Header) -> bool:
    return header.begins_with("distilled_guidance_layer.")


def _flux_names(header: Header) -> bool:
    return header.begins_with("double_blocks.0.img_attn.", "single_blocks.0.linear1.")


def _diffusers_flux(header: Header) -> bool:
    return header.begins_with("single_transformer_blocks.0.") and not _approximator(header)


STORAGE: Sequence[Known] = (
    Known(
        "a checkpoint quantized by nunchaku (SVDQuant), whose four-bit weights need nunchaku's own kernels",
        lambda h: (
            h.ends_with("wscales", "smooth_factor", "smooth_orig", "wtscale", "wcscales")
            and h.ends_with("qweight")
        ),
    ),
    Known(
        "a checkpoint quantized by bitsandbytes (nf4, fp4 or int8), which this server does not read",
        lambda h: (
            h.ends_with("quant_map", "nested_absmax", "SCB", "bitsandbytes__nf4", "bitsandbytes__fp4")
            or h.ends_with("weight.absmax")
        ),
    ),
    Known(
        "a checkpoint quantized by GPTQ or AWQ, which this server does not read",
        lambda h: h.ends_with("qweight") and h.ends_with("qzeros", "g_idx", "scales"),
    ),
    Known(
        "a checkpoint quantized by optimum-quanto, which this server does not read",
        lambda h: h.ends_with("weight._data") and h.ends_with("weight._scale"),
    ),
)
"""Ways to store that are none of ours, whatever the architecture."""

ADAPTER = Known(
    "an adapter (LoRA, LoKr, LoHa or DoRA), not a checkpoint: name it in a request's `loras` beside a model",
    lambda h: (
        h.ends_with(
            "lora_A.weight",
            "lora_B.weight",
            "lora_down.weight",
            "lora_up.weight",
            "lora_A.default.weight",
            "lora_B.default.weight",
            "lora.down.weight",
            "lora.up.weight",
            "lora_A",
            "lora_B",
            "lora_down",
            "lora_up",
            "hada_w1_a",
            "hada_w2_a",
            "lokr_w1",
            "lokr_w2",
            "lokr_w1_a",
            "lokr_w2_a",
            "dora_scale",
            "diff_b",
            "oft_blocks",
        )
        or h.begins_with("lora_unet_", "lora_te", "lycoris_", "lora_transformer_")
    ),
)

TRANSFORMERS: Sequence[Known] = (
    Known(
        "Zeta-Chroma, a Z-Image transformer that draws pixels, which is another model than Chroma",
        lambda h: h.has("cap_embedder.0.weight") and (h.begins_with("dec_net.", "nerf_") or h.has("__x0__")),
    ),
    Known(
        "Chroma1-Radiance with x0 prediction, which draws pixels without an autoencoder: another model",
        lambda h: h.has("__x0__") and h.begins_with("nerf_", "img_in_patch"),
    ),
    Known(
        "Chroma1-Radiance, which draws pixels without an autoencoder: another model than Chroma",
        lambda h: h.begins_with("nerf_", "img_in_patch"),
    ),
    Known("a model with x0 prediction (the marker `__x0__`), which Chroma is not", lambda h: h.has("__x0__")),
    Known(
        "FLUX.2, another model than Chroma",
        lambda h: h.begins_with("double_stream_modulation_img.", "double_stream_modulation_txt."),
    ),
    Known(
        "HunyuanVideo, another model than Chroma",
        lambda h: h.begins_with("txt_in.individual_token_refiner.", "byt5_in."),
    ),
    Known(
        "FLUX.1 dev or a model made from it (it has a guidance embedding and no approximator), another model",
        lambda h: _flux_names(h) and not _approximator(h) and h.begins_with("guidance_in."),
    ),
    Known(
        "FLUX.1, as schnell is (it has modulation layers and no approximator), another model",
        lambda h: (
            _flux_names(h)
            and not _approximator(h)
            and h.begins_with("double_blocks.0.img_mod.", "single_blocks.0.modulation.", "vector_in.", "time_in.")
        ),
    ),
    Known(
        "a transformer of FLUX's layout without Chroma's approximator (`distilled_guidance_layer`), another model",
        lambda h: _flux_names(h) and not _approximator(h),
    ),
    Known(
        "FLUX.1 in diffusers' layout (no approximator), another model than Chroma",
        lambda h: _diffusers_flux(h) and h.begins_with("time_text_embed."),
    ),
    Known(
        "Stable Diffusion XL, another model than Chroma",
        lambda h: (
            h.has("input_blocks.0.0.weight", "label_emb.0.0.weight") or h.has("add_embedding.linear_1.weight")
        ),
    ),
    Known(
        "Stable Diffusion 1 or 2, another model than Chroma",
        lambda h: (
            h.has("input_blocks.0.0.weight")
            or (h.begins_with("down_blocks.0.attentions.") and h.has("time_embedding.linear_1.weight"))
        ),
    ),
    Known(
        "Stable Diffusion 3, another model than Chroma",
        lambda h: (
            h.begins_with("joint_blocks.0.")
            or (h.has("pos_embed.pos_embed") and h.begins_with("transformer_blocks.0."))
        ),
    ),
    Known(
        "Stable Cascade, another model than Chroma", lambda h: h.begins_with("clip_txt_mapper.", "effnet_mapper.")
    ),
    Known("AuraFlow, another model than Chroma", lambda h: h.begins_with("double_layers.0.attn.")),
    Known("Hunyuan-DiT, another model than Chroma", lambda h: h.begins_with("mlp_t5.0.")),
    Known("Mochi, another model than Chroma", lambda h: h.has("t5_yproj.weight")),
    Known(
        "PixArt, another model than Chroma",
        lambda h: (
            (h.has("t_block.1.weight") and h.begins_with("y_embedder.", "blocks.0.cross_attn."))
            or (h.begins_with("adaln_single.emb.") and h.begins_with("pos_embed.proj."))
        ),
    ),
    Known("LTX-Video, another model than Chroma", lambda h: h.begins_with("adaln_single.emb.", "patchify_proj.")),
    Known(
        "Sana, another model than Chroma",
        lambda h: h.has("caption_norm.weight") or h.has("attention_y_norm.weight"),
    ),
    Known("Wan, a video model", lambda h: h.has("head.modulation") and h.begins_with("blocks.0.cross_attn.")),
    Known(
        "Wan in diffusers' layout, a video model",
        lambda h: h.begins_with("condition_embedder.time_embedder.") and h.begins_with("blocks.0.attn2."),
    ),
    Known(
        "Qwen-Image, another model than Chroma",
        lambda h: h.has("txt_norm.weight") and h.begins_with("transformer_blocks.0.img_mod."),
    ),
    Known(
        "Z-Image, another model than Chroma",
        lambda h: (
            h.has("cap_embedder.0.weight")
            and any(
                name.endswith("cap_embedder.1.weight") and shape[0] == 3840
                for name, shape in h.shapes.items()
                if shape
            )
        ),
    ),
    Known(
        "Lumina Image 2 or a model made like it, another model than Chroma",
        lambda h: h.has("cap_embedder.0.weight") or h.begins_with("noise_refiner.0."),
    ),
    Known(
        "HiDream, another model than Chroma",
        lambda h: h.begins_with("double_stream_blocks.0.", "caption_projection.0.linear."),
    ),
    Known("OmniGen2, another model than Chroma", lambda h: h.begins_with("time_caption_embed.")),
    Known("Kandinsky 5, another model than Chroma", lambda h: h.begins_with("visual_transformer_blocks.0.")),
    Known(
        "Cosmos or a model made from it, another model than Chroma",
        lambda h: (
            h.begins_with("blocks.block0.", "llm_adapter.")
            or (h.has("x_embedder.proj.1.weight") and h.begins_with("blocks.0.adaln_modulation_self_attn."))
        ),
    ),
    Known("ACE-Step, a model of music", lambda h: h.has("genre_embedder.weight")),
)
"""Transformers and U-Nets that draw something else; the first that fits is told, so the special come first."""

T5 = Known("a T5 text encoder", lambda h: h.ends_with("SelfAttention.q.weight") or h.begins_with("enc.blk.0."))
ENCODERS: Sequence[Known] = (
    Known(
        "a CLIP text encoder, which Chroma does not use",
        lambda h: (
            h.ends_with("self_attn.q_proj.weight") and any("text_model.encoder.layers." in n for n in h.names)
        ),
    ),
    Known(
        "an OpenCLIP text encoder, which Chroma does not use",
        lambda h: any("transformer.resblocks." in name for name in h.names) or h.begins_with("resblocks.0."),
    ),
    Known("a CLIP vision encoder", lambda h: any("vision_model.encoder." in name for name in h.names)),
    Known(
        "a language model (of the family of Llama, Qwen, Gemma or Mistral), which Chroma does not use",
        lambda h: (
            h.ends_with("self_attn.q_proj.weight", "self_attn.qkv_proj.weight")
            or (h.has("token_embd.weight") and h.begins_with("blk.0."))
        ),
    ),
    Known(
        "a BERT text encoder, which Chroma does not use",
        lambda h: h.ends_with("attention.self.query.weight"),
    ),
)

AUTOENCODERS: Sequence[Known] = (
    Known("a placeholder for pixel-space models, which holds no autoencoder", lambda h: h.has("pixel_space_vae")),
    Known(
        "the autoencoder of Wan or Qwen-Image, which is another one",
        lambda h: h.begins_with("decoder.middle.0.residual.", "decoder.mid_block.resnets.0.norm1.gamma"),
    ),
    Known(
        "an autoencoder of videos, which is another one",
        lambda h: h.ends_with("conv_in.conv.weight") or h.begins_with("per_channel_statistics."),
    ),
    Known("the autoencoder of Sana (DC-AE), which is another one", lambda h: h.begins_with("decoder.stages.0.")),
    Known("the autoencoder of Stable Cascade, which is another one", lambda h: h.begins_with("vquantizer.")),
    Known(
        "a small autoencoder for previews (TAESD), which is another one",
        lambda h: (
            h.begins_with("taesd_decoder.", "decoder.layers.0.conv.") or h.has("0.weight", "0.conv.0.weight")
        ),
    ),
)

CHROMA = Known(
    "a Chroma transformer",
    lambda h: _approximator(h) and (_flux_names(h) or h.begins_with("single_transformer_blocks.0.")),
)
AUTOENCODER = Known(
    "an autoencoder",
    lambda h: h.ends_with("decoder.conv_in.weight") and h.ends_with("decoder.conv_out.weight"),
)
