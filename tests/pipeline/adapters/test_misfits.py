"""Files that fit in part or not at all: what is said, and which keys are named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chromarpc_server.domain.errors import LoraIncompatible, LoraInvalid
from chromarpc_server.pipeline.adapters import Adapter
from tests.pipeline.adapters.conftest import values

Read = Callable[..., Adapter]
STEM = "diffusion_model.txt_in"
PAIR = {f"{STEM}.lora_A.weight": values(2, 48), f"{STEM}.lora_B.weight": values(64, 2)}


def test_what_matches_nothing_is_reported_and_the_rest_works(read: Read, base: dict[str, Tensor]) -> None:
    others = {
        "diffusion_model.nerf_blocks.0.lora_A.weight": values(2, 2),
        "something.else": values(1),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": values(2, 2),
        "diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight": values(2, 2),
        "diffusion_model.img_in.oft_blocks": values(2, 2, 2),
        "diffusion_model.img_in.alpha": torch.tensor(1.0),
    }
    adapter = read({**PAIR, **others})
    assert set(adapter.matched) == set(PAIR)
    assert set(adapter.unmatched) == set(others)
    named = {group.name: set(group.keys) for group in adapter.unsupported}
    assert named == {
        "text encoder": {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"},
        "modulation layers, which Chroma does not have": {
            "diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight"
        },
        "OFT": {"diffusion_model.img_in.oft_blocks", "diffusion_model.img_in.alpha"},
    }
    assert adapter.targets == {"txt_in.weight"}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.b": values(1)}, "in a format this server knows"),
        ({"diffusion_model.blocks.0.lora_A.weight": values(2, 2)}, "looks like LoRA"),
        ({"lora_unet_down_blocks_0_conv.hada_w1_a": values(2, 2)}, "looks like LoHa"),
        ({"lora_te_x.lora_up.weight": values(2, 2)}, "text encoder (1 keys)"),
        ({f"{STEM}.oft_blocks": values(2, 2, 2)}, "OFT (1 keys)"),
        ({f"{STEM}.a1.weight": values(2, 2), f"{STEM}.alpha": torch.tensor(1.0)}, "GLoRA (2 keys)"),
        ({**PAIR, f"{STEM}.lora_mid.weight": values(2, 2)}, "Tucker factors"),
        ({f"{STEM}.alpha": torch.tensor(1.0)}, "in a format this server knows"),
        ({}, "no tensors"),
    ],
)
def test_nothing_that_matches_says_what_was_seen(tensors: dict[str, Tensor], words: str, read: Read) -> None:
    with pytest.raises(LoraIncompatible) as caught:
        read(tensors)
    assert words in caught.value.message
    for key in list(tensors)[:1]:
        assert key in caught.value.message


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{STEM}.lora_A.weight": values(2, 49), f"{STEM}.lora_B.weight": values(64, 2)},
        {f"{STEM}.lora_A.weight": values(2, 48), f"{STEM}.lora_B.weight": values(64, 3)},
        {f"{STEM}.lora_A.weight": values(2, 48, 1, 1), f"{STEM}.lora_B.weight": values(64, 2)},
        {f"{STEM}.lora_A.weight": values(0, 48), f"{STEM}.lora_B.weight": values(64, 0)},
        {f"{STEM}.diff": values(64, 47)},
        {f"{STEM}.diff_b": values(65)},
        {f"{STEM}.lokr_w1": values(8, 8), f"{STEM}.lokr_w2": values(8, 7)},
        {f"{STEM}.lokr_w1_a": values(8, 2), f"{STEM}.lokr_w1_b": values(3, 8), f"{STEM}.lokr_w2": values(8, 6)},
        {f"{STEM}.hada_w1_a": values(64, 2), f"{STEM}.hada_w1_b": values(2, 48)}
        | {f"{STEM}.hada_w2_a": values(64, 2), f"{STEM}.hada_w2_b": values(2, 47)},
        {**PAIR, f"{STEM}.dora_scale": values(48, 1)},
        {**PAIR, f"{STEM}.alpha": values(2)},
        {"diffusion_model.img_in.norm.diff_b": values(1), **PAIR, f"{STEM}.lora_B.bias": values(63)},
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": values(2, 64)}
        | {"transformer.transformer_blocks.0.attn.to_q.lora_B.weight": values(192, 2)},
        {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.lora_A.weight": values(2, 32)}
        | {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.lora_B.weight": values(32, 2)},
        {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff_b": values(32)},
    ],
)
def test_shapes_that_do_not_fit_name_the_module(tensors: dict[str, Tensor], read: Read) -> None:
    with pytest.raises(LoraIncompatible) as caught:
        read(tensors)
    assert next(iter(tensors)).rpartition(".")[0].split(".lora_")[0].split(".diff")[0] in caught.value.message or (
        STEM in caught.value.message
    )


def test_twenty_misfits_are_counted_in_a_message_of_bounded_length(read: Read) -> None:
    tensors = {
        f"diffusion_model.{kind}_blocks.{index}.{inner}.lora_A.weight": values(2, 3)
        for kind, count, inners in (
            ("double", 2, ["img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2"]),
            ("single", 3, ["linear1", "linear2"]),
        )
        for index in range(count)
        for inner in inners
    }
    tensors |= {key.replace("lora_A", "lora_B"): values(5, 2) for key in tensors}
    with pytest.raises(LoraIncompatible) as caught:
        read(tensors)
    assert "18 modules" in caught.value.message
    assert "more" in caught.value.message
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{STEM}.lora_B.weight": values(64, 2)},
        {f"{STEM}.lora_A.weight": values(2, 48)},
        {f"{STEM}.lokr_w1": values(8, 8)},
        {f"{STEM}.lokr_w1": values(8, 8), f"{STEM}.lokr_w2_a": values(8, 2)},
        {f"{STEM}.hada_w1_a": values(64, 2), f"{STEM}.hada_w1_b": values(2, 48)},
        {**PAIR, f"{STEM}.alpha": torch.tensor(torch.inf)},
        {**PAIR, f"{STEM}.alpha": torch.tensor(torch.nan)},
        {**PAIR, f"{STEM}.lora_down.weight": values(2, 48)},
        {**PAIR, f"{STEM}.lora_A.weight": torch.ones(2, 48, dtype=torch.int8)},
        {**PAIR, f"{STEM}.magnitude": torch.full((64,), torch.nan)},
        {f"{STEM}.diff": torch.full((64, 48), torch.inf, dtype=torch.float16)},
        {f"{STEM}.diff": torch.full((64, 48), 1e300, dtype=torch.float64)},
    ],
)
def test_a_damaged_module_is_named(tensors: dict[str, Tensor], read: Read) -> None:
    with pytest.raises(LoraInvalid) as caught:
        read(tensors)
    assert STEM in caught.value.message


def test_values_that_are_not_finite_do_no_harm_where_nothing_uses_them(read: Read) -> None:
    assert read({**PAIR, "other": torch.tensor(torch.nan)}).unmatched == ("other",)


@pytest.mark.parametrize(
    "other",
    [
        {f"{STEM}.diff": values(64, 48)},
        {"lora_unet_txt_in.lora_down.weight": values(2, 48), "lora_unet_txt_in.lora_up.weight": values(64, 2)},
    ],
)
def test_two_changes_of_one_weight_are_refused(other: dict[str, Tensor], read: Read) -> None:
    with pytest.raises(LoraIncompatible, match=r"change the same rows of txt_in\.weight"):
        read({**PAIR, **other})


def test_keys_are_shown_without_control_characters(read: Read) -> None:
    with pytest.raises(LoraIncompatible) as caught:
        read({"\x1b[31mred\n" + "x" * 500 + ".lora_A.weight": values(1)})
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_metadata_is_bounded(read: Read) -> None:
    adapter = read(PAIR, {"k" * 1000: "v" * 100_000, **{str(number): "" for number in range(500)}})
    assert len(adapter.metadata) == 100
    assert sum(len(key) + len(value) for key, value in adapter.metadata.items()) < 20_000


@pytest.mark.parametrize(
    "tensors",
    [
        {key: tensor * 1e30 for key, tensor in PAIR.items()},
        {**PAIR, f"{STEM}.alpha": torch.tensor(3e38)},
        {**PAIR, f"{STEM}.alpha": torch.tensor(-1e300, dtype=torch.float64)},
        {**PAIR, f"{STEM}.dora_scale": torch.full((64, 1), 1e20)},
        {f"{STEM}.diff": torch.full((64, 48), 1e20)},
        {f"{STEM}.diff_b": torch.full((64,), -1e20)},
        {f"{STEM}.lokr_w1": torch.full((8, 8), 1e10), f"{STEM}.lokr_w2": torch.full((8, 6), 1e10)},
        {f"{STEM}.hada_w1_a": torch.full((64, 1), 1e20), f"{STEM}.hada_w1_b": torch.ones(1, 48)}
        | {f"{STEM}.hada_w2_a": torch.ones(64, 1), f"{STEM}.hada_w2_b": torch.ones(1, 48)},
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.full((1, 64), 1e10)}
        | {"transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.full((64, 1), 1e10)},
    ],
)
def test_finite_values_whose_products_are_not_are_refused_by_name(tensors: dict[str, Tensor], read: Read) -> None:
    with pytest.raises(LoraInvalid, match=r"overflow, for (txt_in|double_blocks\.0\.img_attn\.qkv)\."):
        read(tensors)


def test_whatever_float16_holds_is_small_enough(read: Read) -> None:
    adapter = read({key: torch.full_like(tensor, 65504).half() for key, tensor in PAIR.items()})
    assert torch.isfinite(adapter.apply("txt_in.weight", torch.zeros(64, 48), 2.0)).all()


@pytest.mark.parametrize(
    ("tensors", "has_effect"),
    [
        (PAIR, True),
        ({**PAIR, f"{STEM}.lora_B.weight": torch.zeros(64, 2)}, False),
        ({**PAIR, f"{STEM}.alpha": torch.tensor(0.0)}, False),
        ({f"{STEM}.diff": torch.zeros(64, 48)}, False),
        # Trained magnitudes turn a weight even where the Δ below them is still zero.
        ({**PAIR, f"{STEM}.lora_B.weight": torch.zeros(64, 2), f"{STEM}.dora_scale": torch.ones(64, 1)}, True),
    ],
)
def test_a_file_that_changes_nothing_is_known(tensors: dict[str, Tensor], has_effect: bool, read: Read) -> None:
    assert read(tensors).has_effect is has_effect


@pytest.mark.parametrize(
    ("header", "unread"),
    [
        ('{"transformer.lora_alpha": 2}', ()),
        ('{"lora_alpha": 2, "alpha_pattern": {"^txt_in$": 1, "double_blocks\\\\.0": 2}}', ()),
        ("{", ("lora_adapter_metadata",)),
        ("[]", ("lora_adapter_metadata",)),
        ('{"lora_alpha": "2"}', ("lora_alpha",)),
        ('{"alpha_pattern": [1]}', ("alpha_pattern",)),
        ('{"alpha_pattern": {".*attn.*": 1, "txt_in": NaN}}', ("alpha_pattern .*attn.*", "alpha_pattern txt_in")),
    ],
)
def test_scales_in_the_header_that_cannot_be_followed_are_told(
    header: str, unread: tuple[str, ...], read: Read
) -> None:
    assert read(PAIR, {"lora_adapter_metadata": header}).unread_scales == unread


def test_a_pattern_of_the_header_may_escape_its_dots(read: Read) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    header = '{"alpha_pattern": {"^transformer_blocks\\\\.0\\\\.attn\\\\.to_q$": 1}}'
    pair = {f"{stem}.lora_A.weight": values(2, 64), f"{stem}.lora_B.weight": values(64, 2)}
    weight = torch.zeros(192, 64)
    changed = read(pair, {"lora_adapter_metadata": header}).apply(
        "double_blocks.0.img_attn.qkv.weight", weight, 1.0
    )
    expected = pair[f"{stem}.lora_B.weight"] @ pair[f"{stem}.lora_A.weight"] * 0.5
    assert torch.allclose(changed[:64], expected)
