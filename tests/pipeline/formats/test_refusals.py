"""Files that are no part of a Chroma model are refused by name, from what their headers say."""

from __future__ import annotations

import pytest

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights.formats.prefixes import Part
from chromarpc_server.pipeline.weights.formats.refusals import GIVE, refuse_other

FLUX = (
    "double_blocks.0.img_attn.norm.key_norm.scale",
    "double_blocks.0.img_attn.qkv.weight",
    "single_blocks.37.linear1.weight",
    "img_in.weight",
)
CHROMA = (*FLUX, "distilled_guidance_layer.in_proj.weight", "distilled_guidance_layer.layers.4.in_layer.weight")
T5 = ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.23.layer.1.DenseReluDense.wi_0.weight")
AUTOENCODER = ("decoder.conv_in.weight", "decoder.conv_out.weight", "encoder.down.0.block.0.conv1.weight")

TRANSFORMERS = {
    "Chroma1-Radiance, which": (*CHROMA, "img_in_patch.weight", "nerf_blocks.0.param_generator.weight"),
    "Radiance with x0 prediction": (
        *CHROMA,
        "img_in_patch.weight",
        "nerf_image_embedder.embedder.0.weight",
        "__x0__",
    ),
    "x0 prediction (the marker": (*CHROMA, "__x0__"),
    "Zeta-Chroma": (
        "cap_embedder.0.weight",
        "layers.0.attention.qkv.weight",
        "dec_net.cond_embed.weight",
        "__x0__",
    ),
    "FLUX.1 dev": (*FLUX, "guidance_in.in_layer.weight", "double_blocks.0.img_mod.lin.weight"),
    "FLUX.1, as schnell": (*FLUX, "double_blocks.0.img_mod.lin.weight", "vector_in.in_layer.weight"),
    "without Chroma's approximator": FLUX,
    "FLUX.1 in diffusers": (
        "single_transformer_blocks.0.attn.to_q.weight",
        "time_text_embed.text_embedder.linear_1.weight",
    ),
    "FLUX.2": (*FLUX, "double_stream_modulation_img.lin.weight"),
    "HunyuanVideo": (
        *FLUX,
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "guidance_in.in_layer.weight",
    ),
    "Stable Diffusion XL": (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "first_stage_model.decoder.conv_in.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    ),
    "Stable Diffusion 1 or 2": (
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    ),
    "Stable Diffusion 3": ("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",),
    "AuraFlow": ("double_layers.0.attn.w1q.weight", "positional_encoding"),
    "PixArt": ("t_block.1.weight", "y_embedder.y_embedding", "blocks.0.cross_attn.q_linear.weight"),
    "LTX-Video": ("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight"),
    "Wan, a video model": ("head.modulation", "blocks.0.cross_attn.k.weight", "patch_embedding.weight"),
    "Qwen-Image": ("txt_norm.weight", "transformer_blocks.59.img_mod.1.weight", "img_in.weight"),
    "Lumina Image 2": ("cap_embedder.0.weight", "noise_refiner.0.attention.qkv.weight"),
    "HiDream": ("double_stream_blocks.0.block.attn1.to_q.weight", "caption_projection.0.linear.weight"),
    "Cosmos": ("net.blocks.block0.blocks.0.block.attn.to_q.0.weight",),
    "a T5 text encoder": T5,
    "a CLIP text encoder": ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
    "an autoencoder": AUTOENCODER,
}
STORAGE = {
    "nunchaku": ("transformer_blocks.0.qlinear1.wscales", "transformer_blocks.0.qlinear1.qweight"),
    "bitsandbytes": (*CHROMA, "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"),
    "GPTQ or AWQ": ("double_blocks.0.img_attn.qkv.qweight", "double_blocks.0.img_attn.qkv.qzeros"),
    "an adapter": ("diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight",),
    "an adapter (": ("lora_unet_double_blocks_0_img_attn_proj.lokr_w1",),
}
ENCODERS = {
    "a CLIP text encoder": ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
    "an OpenCLIP text encoder": ("transformer.resblocks.0.attn.in_proj_weight",),
    "UMT5": (*T5, "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
    "T5 of the first version": (T5[0], "encoder.block.0.layer.1.DenseReluDense.wi.weight"),
    "a language model": ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"),
    "a Chroma transformer": CHROMA,
    "Stable Diffusion XL": TRANSFORMERS["Stable Diffusion XL"],
}
AUTOENCODERS = {
    "placeholder": ("pixel_space_vae",),
    "Wan or Qwen-Image": ("decoder.middle.0.residual.0.gamma", "conv1.weight"),
    "TAESD": ("taesd_decoder.1.weight",),
    "a Chroma transformer": CHROMA,
    "a T5 text encoder": T5,
}


def _message(names: tuple[str, ...], part: Part, metadata: dict[str, str] | None = None) -> str:
    with pytest.raises(WeightsInvalid) as refused:
        refuse_other(dict.fromkeys(names, (8, 8)), metadata or {}, part, "some.file")
    return refused.value.message


@pytest.mark.parametrize("what", TRANSFORMERS)
def test_other_transformers_are_named(what: str) -> None:
    message = _message(TRANSFORMERS[what], "transformer")
    assert what in message
    assert message.startswith("some.file: this is ")
    assert message.endswith(GIVE["transformer"])


@pytest.mark.parametrize(
    "what", [what for what in TRANSFORMERS if not what.startswith("a ") and what != "an autoencoder"]
)
def test_a_prefix_hides_nothing(what: str) -> None:
    names = tuple(
        f"model.diffusion_model.{name.removeprefix('model.diffusion_model.')}" for name in TRANSFORMERS[what]
    )
    assert what in _message(names, "transformer")


@pytest.mark.parametrize("what", STORAGE)
@pytest.mark.parametrize("part", GIVE)
def test_foreign_ways_to_store_are_named_whatever_the_part(what: str, part: Part) -> None:
    assert what in _message(STORAGE[what], part)


@pytest.mark.parametrize("what", ENCODERS)
def test_other_text_encoders_are_named(what: str) -> None:
    assert what in _message(ENCODERS[what], "text_encoder")


@pytest.mark.parametrize("what", AUTOENCODERS)
def test_other_autoencoders_are_named(what: str) -> None:
    assert what in _message(AUTOENCODERS[what], "autoencoder")


@pytest.mark.parametrize(
    ("channels", "model"), [(4, "Stable Diffusion 1, 2 or XL"), (32, "FLUX.2"), (8, "8 latent")]
)
def test_an_autoencoder_of_other_latents_is_named(channels: int, model: str) -> None:
    shapes = {"decoder.conv_in.weight": (512, channels, 3, 3), "decoder.conv_out.weight": (3, 128, 3, 3)}
    with pytest.raises(WeightsInvalid, match=model):
        refuse_other(shapes, {}, "autoencoder", "sdxl_vae.safetensors")


def test_z_image_is_told_from_lumina_by_its_width() -> None:
    with pytest.raises(WeightsInvalid, match="this is Z-Image"):
        refuse_other(
            {"cap_embedder.0.weight": (2560,), "cap_embedder.1.weight": (3840, 2560)},
            {},
            "transformer",
            "z.safetensors",
        )


def test_a_multilingual_t5_is_told_by_its_vocabulary() -> None:
    shapes = {T5[0]: (4096, 4096), "shared.weight": (250112, 4096)}
    with pytest.raises(WeightsInvalid, match="multilingual T5"):
        refuse_other(shapes, {}, "text_encoder", "mt5.safetensors")


def test_a_name_without_end_takes_no_time_without_end() -> None:
    """Within the suite's limit of time: looked at from each of its beginnings, it would take hours."""
    refuse_other({T5[0]: (8, 8), "encoder.block.1." * 500_000: (8,)}, {}, "text_encoder", "t5.safetensors")


def test_a_gguf_file_of_another_architecture_is_named() -> None:
    assert "the architecture 'llama'" in _message(
        ("token_embd.weight",), "transformer", {"general.architecture": "llama"}
    )
    assert "the architecture 'flux'" in _message(CHROMA, "text_encoder", {"general.architecture": "flux"})


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (CHROMA, "transformer"),
        (tuple(f"model.diffusion_model.{name}" for name in CHROMA), "transformer"),
        (
            ("distilled_guidance_layer.in_proj.weight", "single_transformer_blocks.0.attn.to_q.weight"),
            "transformer",
        ),
        (T5, "text_encoder"),
        (("enc.blk.0.attn_q.weight", "token_embd.weight"), "text_encoder"),
        (("decoder.conv_in.bias", "decoder.up.0.block.0.conv1.weight"), "autoencoder"),
        (("nobody.knows.this",), "transformer"),
        ((), "transformer"),
    ],
)
def test_chroma_and_what_nobody_knows_pass(names: tuple[str, ...], part: Part) -> None:
    refuse_other(dict.fromkeys(names, (8, 16)), {}, part, "some.file")


@pytest.mark.parametrize("part", GIVE)
def test_a_file_of_all_parts_is_every_part(part: Part) -> None:
    names = (
        *(f"model.diffusion_model.{name}" for name in CHROMA),
        *(f"text_encoders.t5xxl.transformer.{name}" for name in T5),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        *(f"vae.{name}" for name in AUTOENCODER),
    )
    refuse_other(dict.fromkeys(names, (16, 16, 3, 3)), {}, part, "all.safetensors")
