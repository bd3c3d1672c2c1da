"""The same change, however a trainer spells it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chromarpc_server.pipeline.adapters import Adapter
from chromarpc_server.pipeline.adapters.module_names import places
from tests.pipeline.adapters.conftest import Shapes, rel, values

Read = Callable[..., Adapter]
MODULE = "double_blocks.1.txt_mlp.2"
DIFFUSERS = "transformer_blocks.1.ff_context.net.2"
WEIGHT = f"{MODULE}.weight"
SHAPE = (64, 256)
STRENGTH = 0.7
PAIR = (values(4, 256, seed=1), values(64, 4, seed=2))


def _joined(name: str) -> str:
    return name.replace(".", "_")


@pytest.mark.parametrize(
    ("stem", "form"),
    [
        (f"diffusion_model.{MODULE}", "ai-toolkit LoRA"),
        (f"model.diffusion_model.{MODULE}", "native LoRA"),
        (MODULE, "native LoRA"),
        (f"transformer.{MODULE}", "OneTrainer LoRA"),
        (f"base_model.model.{MODULE}", "PEFT LoRA"),
        (f"lora_unet_{_joined(MODULE)}", "kohya LoRA"),
        (f"lycoris_{_joined(MODULE)}", "LyCORIS LoRA"),
        (f"transformer.{DIFFUSERS}", "diffusers LoRA"),
        (DIFFUSERS, "diffusers LoRA"),
        (f"diffusion_model.{DIFFUSERS}", "diffusers LoRA"),
        (f"base_model.model.{DIFFUSERS}", "PEFT LoRA"),
        (f"lora_transformer.{DIFFUSERS}", "OneTrainer LoRA"),
        (f"lora_transformer_{_joined(DIFFUSERS)}", "OneTrainer LoRA"),
        (f"lora_unet_{_joined(DIFFUSERS)}", "kohya LoRA"),
        (f"lycoris_{_joined(DIFFUSERS)}", "LyCORIS LoRA"),
    ],
)
@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_A", "lora_B"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
def test_a_pair_under_any_name(
    stem: str, form: str, down: str, up: str, read: Read, base: dict[str, Tensor]
) -> None:
    adapter = read({f"{stem}.{down}": PAIR[0], f"{stem}.{up}": PAIR[1], f"{stem}.alpha": torch.tensor(2.0)})
    assert adapter.targets == {WEIGHT}
    assert adapter.format == form
    assert adapter.unmatched == ()
    expected = base[WEIGHT] + STRENGTH * 0.5 * (PAIR[1] @ PAIR[0])
    assert rel(adapter.apply(WEIGHT, base[WEIGHT], STRENGTH), expected) < 1e-6


@pytest.mark.parametrize(
    ("native", "name", "rows"),
    [
        ("img_in", "x_embedder", None),
        ("img_in", "img_in.proj", None),
        ("txt_in", "context_embedder", None),
        ("final_layer.linear", "proj_out", None),
        ("distilled_guidance_layer.layers.3.in_layer", "distilled_guidance_layer.layers.3.linear_1", None),
        ("distilled_guidance_layer.layers.3.out_layer", "distilled_guidance_layer.layers.3.linear_2", None),
        ("distilled_guidance_layer.in_proj", "distilled_guidance_layer.in_proj", None),
        ("distilled_guidance_layer.norms.0", "distilled_guidance_layer.norms.0", None),
        ("double_blocks.1.img_attn.qkv", "transformer_blocks.1.attn.to_k", (64, 128)),
        ("double_blocks.1.img_attn.qkv", "double_blocks.1.img_attn.qkv.2", (128, 192)),
        ("double_blocks.1.txt_attn.qkv", "transformer_blocks.1.attn.add_v_proj", (128, 192)),
        ("double_blocks.1.img_attn.norm.query_norm", "transformer_blocks.1.attn.norm_q", None),
        ("double_blocks.1.txt_attn.norm.key_norm", "transformer_blocks.1.attn.norm_added_k", None),
        ("single_blocks.2.linear1", "single_transformer_blocks.2.attn.to_q", (0, 64)),
        ("single_blocks.2.linear1", "single_transformer_blocks.2.proj_mlp", (192, 448)),
        ("single_blocks.2.linear1", "single_blocks.2.linear1.3", (192, 448)),
        ("single_blocks.2.linear1", "single_blocks.2.linear1_qkv", (0, 192)),
        ("single_blocks.2.linear2", "single_transformer_blocks.2.proj_out", None),
    ],
)
def test_where_a_name_lies(native: str, name: str, rows: tuple[int, int] | None, targets: Shapes) -> None:
    place = places(targets)[f"transformer.{name}"]
    assert (place.module, place.rows) == (native, rows)


def test_every_parameter_of_the_model_can_be_named(targets: Shapes) -> None:
    named = places(targets)
    for parameter in targets:
        stem, _, what = parameter.rpartition(".")
        place = named[f"diffusion_model.{stem}"]
        assert place.parameter("bias" if what == "bias" else "weight", targets) == parameter


def _dora(base: Tensor, delta: Tensor, magnitude: Tensor, dim: int) -> Tensor:
    moved = base.double() + delta.double()
    changed: Tensor = (moved * magnitude.double() / moved.norm(dim=dim, keepdim=True)).float()
    return changed


@pytest.mark.parametrize(
    ("magnitude", "shape"),
    [
        ("magnitude", (64,)),
        ("lora_magnitude_vector", (64,)),
        ("lora_magnitude_vector.weight", (64,)),
        ("dora_scale", (64, 1)),
        ("dora_scale", (1, 256)),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_by_its_trainers_formula(
    magnitude: str, shape: tuple[int, ...], strength: float, read: Read, base: dict[str, Tensor]
) -> None:
    scale = values(*shape, seed=3).abs() + 1
    stem = f"diffusion_model.{MODULE}"
    adapter = read(
        {f"{stem}.lora_A.weight": PAIR[0], f"{stem}.lora_B.weight": PAIR[1], f"{stem}.{magnitude}": scale}
    )
    assert adapter.format == "ai-toolkit DoRA"
    assert adapter.unmatched == ()
    columns = shape == (1, 256)
    whole = _dora(base[WEIGHT], PAIR[1] @ PAIR[0], scale if columns else scale.reshape(64, 1), 0 if columns else 1)
    expected = base[WEIGHT] + strength * (whole - base[WEIGHT])
    assert rel(adapter.apply(WEIGHT, base[WEIGHT], strength), expected) < 1e-6


def test_dora_of_split_rows_takes_each_parts_own_norm(read: Read, base: dict[str, Tensor]) -> None:
    stem, weight = "transformer.single_transformer_blocks.1.attn.to_v", "single_blocks.1.linear1.weight"
    down, up, scale = values(2, 64, seed=1), values(64, 2, seed=2), values(64, seed=3).abs()
    adapter = read(
        {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.lora_magnitude_vector": scale}
    )
    changed = adapter.apply(weight, base[weight], 1.0)
    assert rel(changed[128:192], _dora(base[weight][128:192], up @ down, scale.reshape(64, 1), 1)) < 1e-6
    assert torch.equal(changed[:128], base[weight][:128])
    assert torch.equal(changed[192:], base[weight][192:])


def test_dora_of_a_row_of_zeros_stays_finite(read: Read, base: dict[str, Tensor]) -> None:
    stem = f"diffusion_model.{MODULE}"
    pair = {f"{stem}.lora_A.weight": PAIR[0], f"{stem}.lora_B.weight": torch.zeros(64, 4)}
    adapter = read({**pair, f"{stem}.magnitude": torch.ones(64)})
    assert torch.isfinite(adapter.apply(WEIGHT, torch.zeros(SHAPE), 1.0)).all()


@pytest.mark.parametrize("stem", [f"diffusion_model.{MODULE}", f"lycoris_{_joined(DIFFUSERS)}"])
@pytest.mark.parametrize("kind", ["lokr", "loha", "diff"])
def test_other_kinds_under_other_names(stem: str, kind: str, read: Read, base: dict[str, Tensor]) -> None:
    parts = {
        "lokr": {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 4), "lokr_w2": (8, 64)},
        "loha": {"hada_w1_a": (64, 3), "hada_w1_b": (3, 256), "hada_w2_a": (64, 3), "hada_w2_b": (3, 256)},
        "diff": {"diff": SHAPE},
    }[kind]
    tensors = {name: values(*shape, seed=seed) for seed, (name, shape) in enumerate(parts.items())}
    adapter = read(
        {f"{stem}.{name}": tensor for name, tensor in tensors.items()} | {f"{stem}.alpha": torch.tensor(5.0)}
    )
    delta = {
        "lokr": lambda a, b, w2: torch.kron(a @ b, w2) * 5 / 2,
        "loha": lambda a, b, c, d: (a @ b) * (c @ d) * 5 / 3,
        "diff": lambda d: d,
    }[kind](*tensors.values())
    assert adapter.ranks == {"lokr": (2,), "loha": (3,), "diff": ()}[kind]
    assert rel(adapter.apply(WEIGHT, base[WEIGHT], STRENGTH) - base[WEIGHT], STRENGTH * delta) < 1e-4


@pytest.mark.parametrize("alpha", [9999999999.0, math.inf])
def test_the_alpha_of_a_full_rank_lokr_means_nothing(alpha: float, read: Read, base: dict[str, Tensor]) -> None:
    stem = f"diffusion_model.{MODULE}"
    w1, w2 = values(8, 4, seed=1), values(8, 64, seed=2)
    adapter = read({f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": torch.tensor(alpha).half()})
    assert rel(adapter.apply(WEIGHT, base[WEIGHT], 1.0), base[WEIGHT] + torch.kron(w1, w2)) < 1e-6


@pytest.mark.parametrize("stem", [f"diffusion_model.{MODULE}", f"transformer.{DIFFUSERS}"])
def test_ai_toolkits_full_rank_is_a_lone_lora_a(stem: str, read: Read, base: dict[str, Tensor]) -> None:
    change = values(*SHAPE, seed=1)
    adapter = read({f"{stem}.lora_A.weight": change})
    assert rel(adapter.apply(WEIGHT, base[WEIGHT], STRENGTH), base[WEIGHT] + STRENGTH * change) < 1e-6


def test_a_bias_on_lora_b_adds_to_the_modules_bias(read: Read, base: dict[str, Tensor]) -> None:
    stem, bias = f"transformer.{DIFFUSERS}", values(64, seed=3)
    adapter = read(
        {
            f"{stem}.lora_A.weight": PAIR[0],
            f"{stem}.lora_B.weight": PAIR[1],
            f"{stem}.lora_B.bias": bias,
            f"{stem}.alpha": torch.tensor(2.0),
        }
    )
    name = f"{MODULE}.bias"
    assert adapter.targets == {WEIGHT, name}
    assert rel(adapter.apply(name, base[name], 1.0), base[name] + 0.5 * bias) < 1e-6


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"transformer.lora_alpha": 8}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {DIFFUSERS: 1}}, 0.25),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"^ff_context.net.2": 1}}, 0.25),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"net": 1}}, 2.0),
        ({"lora_alpha": 8}, 2.0),
        ({"transformer.lora_alpha": "8"}, 1.0),
        ([], 1.0),
    ],
)
def test_alpha_from_the_header_of_diffusers(
    options: object, scale: float, read: Read, base: dict[str, Tensor]
) -> None:
    stem = f"transformer.{DIFFUSERS}"
    pair = {f"{stem}.lora_A.weight": PAIR[0], f"{stem}.lora_B.weight": PAIR[1]}
    adapter = read(pair, {"lora_adapter_metadata": json.dumps(options)})
    assert rel(adapter.apply(WEIGHT, base[WEIGHT], 1.0), base[WEIGHT] + scale * (PAIR[1] @ PAIR[0])) < 1e-6
    own = read({**pair, f"{stem}.alpha": torch.tensor(12.0)}, {"lora_adapter_metadata": json.dumps(options)})
    assert rel(own.apply(WEIGHT, base[WEIGHT], 1.0), base[WEIGHT] + 3 * (PAIR[1] @ PAIR[0])) < 1e-6
