"""`preview` and `preview-exact`: one function in both, the trainer's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.domain.trainer import TRAINER_QTYPES, TrainerSettings
from chromarpc_server.pipeline import PROFILES
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.transformer import linear_weights
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.trainer.exact import ExactPreview
from chromarpc_server.pipeline.trainer.forward import TrainerLinear, make_modulations
from chromarpc_server.pipeline.trainer.fused import FusedPreview
from chromarpc_server.pipeline.weights.quantizers import quantize_linear
from chromarpc_server.pipeline.weights.stored import as_they_are
from tests.pipeline.adapters.conftest import rel
from tests.pipeline.trainer.models import (
    CPU,
    FLOAT32,
    OLD_LOKR,
    SETS,
    Build,
    Set,
    exact,
    linears,
    velocity,
)


@pytest.mark.parametrize("hold_float8", [False, True], ids=["dequantized", "float8"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, FLOAT32) for name in SETS), *((name, OLD_LOKR) for name in SETS if "lokr" in name)],
    ids=lambda value: value if isinstance(value, str) else value.lokr_form,
)
def test_both_profiles_compute_one_function(
    name: str,
    settings: TrainerSettings,
    hold_float8: bool,
    master: dict[str, Tensor],
    config: ChromaConfig,
    adapter_set: Callable[[str], Set],
    fused: Build,
) -> None:
    adapters = adapter_set(name)
    found = velocity(fused(adapters, settings, hold_float8=hold_float8))
    expected = velocity(exact(config, master, adapters, settings))
    assert rel(found, expected) < 1e-5
    if adapters:
        assert rel(velocity(fused([], settings)), expected) > 1e-3, "the adapters have an effect"


def test_an_unquantized_model_has_its_adapters_merged(
    master: dict[str, Tensor], config: ChromaConfig, adapter_set: Callable[[str], Set], fused: Build
) -> None:
    settings = TrainerSettings(quantize=False, quantize_te=False, dtype="float32")
    adapters = adapter_set("lokr and lora")
    model = fused(adapters, settings)
    assert all(module.down is None and not module.paths for module in linears(model).values())
    assert rel(velocity(model), velocity(exact(config, master, adapters, settings))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("qtype", ["qfloat8", "float8"])
@torch.inference_mode()
def test_modulations_are_the_trainers_own_bits_whatever_is_computed_in(
    qtype: str, dtype: torch.dtype, master: dict[str, Tensor], config: ChromaConfig
) -> None:
    held = {name: tensor.bfloat16() for name, tensor in master.items()}
    linears = {
        name.removesuffix(".weight"): TrainerLinear(
            quantize_linear(held[name], qtype), held[f"{name.removesuffix('.weight')}.bias"]
        )
        for name in linear_weights(config)
    }
    timesteps = torch.tensor([1.0, 0.7109375, 0.0625])
    expected = [
        make_modulations(config, lambda name, x: linears[name](x), held, timestep)
        for timestep in timesteps.bfloat16().split(1)
    ]
    settings = TrainerSettings(qtype=qtype)
    model = FusedPreview(config, as_they_are(master), PROFILES["preview"], settings, DevicePlacement(CPU, dtype))
    model.switch([])
    found = model.modulations(timesteps.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found.bfloat16(), torch.cat(expected))
    wide = FusedPreview(
        config,
        as_they_are(master),
        PROFILES["preview"],
        settings,
        DevicePlacement(CPU, dtype),
        modulation_dtype=torch.float32,
    )
    wide.switch([])
    assert rel(found.float(), wide.modulations(timesteps).float()) > 1e-3


@torch.inference_mode()
def test_an_adapter_of_the_layers_that_make_modulations_changes_them_as_the_trainer_would(
    master: dict[str, Tensor], config: ChromaConfig, adapter_set: Callable[[str], Set], fused: Build
) -> None:
    timesteps = torch.tensor([0.5])
    for name in ("rank 100", "lokr and lora", "dora"):
        adapters = adapter_set(name)
        found = fused(adapters).modulations(timesteps)
        transformer = exact(config, master, adapters, FLOAT32).transformer
        expected = make_modulations(
            config, lambda module, x, of=transformer: of.linears[module](x), transformer.gains, timesteps
        )
        assert rel(found, expected) < 1e-5
    assert rel(fused(adapter_set("rank 100")).modulations(timesteps), fused([]).modulations(timesteps)) > 1e-3


@pytest.mark.parametrize("qtype", TRAINER_QTYPES)
@pytest.mark.parametrize("profile", ["preview", "preview-exact"])
def test_a_row_of_zeros_is_refused_with_its_tensor_named_where_the_trainer_has_nan(
    profile: str, qtype: str, master: dict[str, Tensor], config: ChromaConfig
) -> None:
    name = "single_blocks.0.linear1.weight"
    with_zeros = {**master, name: master[name].clone()}
    with_zeros[name][3] = 0

    def build(settings: TrainerSettings) -> FusedPreview | ExactPreview:
        if profile == "preview":
            return FusedPreview(
                config, as_they_are(with_zeros), PROFILES[profile], settings, DevicePlacement(CPU, torch.float32)
            )
        return ExactPreview(config, as_they_are(with_zeros), PROFILES[profile], settings, device=CPU)

    settings = TrainerSettings(qtype=qtype, dtype="float32")
    if qtype in ("qfloat8", "qfloat8_e5m2"):
        with pytest.raises(WeightsInvalid, match=rf"single_blocks\.0\.linear1\.weight.*zeros.*{qtype} turns"):
            build(settings).switch([])
        # An unquantized model takes it as it is.
        settings = TrainerSettings(quantize=False, qtype=qtype, dtype="float32")
    # Others have a smallest scale, or give integers, which know no NaN, and multiply them by 0.
    model = build(settings)
    model.switch([])
    assert bool(torch.isfinite(velocity(model)).all())
