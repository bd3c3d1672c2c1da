"""T5 v1.1's encoder comes out of every layout under Hugging Face's names, with its sizes."""

from __future__ import annotations

import pytest

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.models.text_encoder import text_encoder_config
from chromarpc_server.pipeline.weights.formats.text_encoder import text_encoder_part
from tests.pipeline.formats.layouts import recipes_of, t5_shapes

LLAMA_CPP = {
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}


def test_sizes_of_the_full_encoder_are_read_off_its_tensors() -> None:
    shapes = t5_shapes(width=4096, heads=64, head=64, gate=10240, blocks=24, vocabulary=32128)
    part = text_encoder_part(recipes_of(shapes), "t5xxl.safetensors")
    sizes = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "relative_attention_num_buckets")
    assert [part.config[size] for size in sizes] == [4096, 64, 10240, 24, 64, 32128, 32]
    assert part.config["feed_forward_proj"] == "gated-gelu"
    assert not part.left_out


def test_llama_cpps_names_become_hugging_faces() -> None:
    shapes = t5_shapes()
    named = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    for name in shapes:
        if name not in named:
            _, _, block, inner = name.removesuffix(".weight").split(".", 3)
            named[name] = f"enc.blk.{block}.{LLAMA_CPP[inner]}.weight"
    part = text_encoder_part(recipes_of({named[name]: shape for name, shape in shapes.items()}), "t5.gguf")
    assert {name: recipe.pieces for name, recipe in part.recipes.items()} == {
        name: (named[name],) for name in shapes
    }


def test_the_embedding_is_one_whatever_it_is_called() -> None:
    shapes = t5_shapes()
    embed = "encoder.embed_tokens.weight"
    both = text_encoder_part(recipes_of({**shapes, embed: shapes["shared.weight"]}), "both")
    assert set(both.recipes) == set(shapes)
    alone = {embed if name == "shared.weight" else name: shape for name, shape in shapes.items()}
    assert text_encoder_part(recipes_of(alone), "alone").recipes["shared.weight"].pieces == (embed,)


@pytest.mark.parametrize(
    "name", ["decoder.block.0.layer.0.layer_norm.weight", "dec.blk.0.attn_q.weight", "lm_head.weight"]
)
def test_a_decoder_is_left_out_and_that_is_said(name: str) -> None:
    part = text_encoder_part(recipes_of({**t5_shapes(), name: (8,)}), "t5.safetensors")
    assert name not in part.recipes
    assert "the decoder's 1 tensors" in part.left_out


def test_what_comfyui_writes_beside_an_encoder_is_no_weight() -> None:
    part = text_encoder_part(recipes_of({**t5_shapes(), "logit_scale": ()}), "t5.safetensors")
    assert "logit_scale" not in part.recipes
    assert not part.left_out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared.weight": None}, "no tensor 'shared.weight'"),
        ({"encoder.block.1.layer.1.layer_norm.weight": None}, "1 tensors of a T5 v1.1 encoder missing"),
        ({"encoder.block.9.layer.1.layer_norm.weight": (8,)}, "missing"),
        ({"encoder.something.weight": (8,)}, "1 unknown"),
        ({"encoder.block.1.layer.0.SelfAttention.q.weight": (9, 8)}, r"shape \(9, 8\), and not \(8, 8\)"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (9, 8)}, "9 channels of attention"),
        ({"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 0)}, "shape"),
        ({"shared.weight": (10,)}, r"'shared.weight' has the shape \(10,\)"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    shapes = {name: shape for name, shape in {**t5_shapes(), **change}.items() if shape is not None}
    with pytest.raises(WeightsInvalid, match=message):
        text_encoder_part(recipes_of(shapes), "t5.safetensors")


def test_a_config_that_says_other_sizes_is_refused() -> None:
    with pytest.raises(WeightsInvalid, match="its config says num_heads '4', and its tensors have 2"):
        text_encoder_part(recipes_of(t5_shapes()), "text_encoder", {"num_heads": 4, "d_model": 8})


def test_a_folders_config_is_taken_as_it_is() -> None:
    config = {"d_model": 8, "num_heads": 2, "layer_norm_epsilon": 1e-5, "relative_attention_max_distance": 64}
    assert text_encoder_part(recipes_of(t5_shapes()), "text_encoder", config).config == config


def test_a_config_that_transformers_does_not_take_is_refused() -> None:
    with pytest.raises(WeightsInvalid, match="the text encoder's config cannot be used"):
        text_encoder_config({"feed_forward_proj": "gated-gelu-twice-over"})
