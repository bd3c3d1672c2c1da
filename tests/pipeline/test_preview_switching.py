"""`preview` and `preview-exact` with other adapters: one function in both, and no trace of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from chromarpc_server.domain.errors import JobCancelled, WeightsInvalid
from chromarpc_server.domain.trainer import TRAINER_QTYPES, LokrForm, TrainerSettings
from chromarpc_server.pipeline import PROFILES, Adapter, LoadContext, read_adapter
from chromarpc_server.pipeline.denoising import Text
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.transformer import linear_weights
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.trainer.exact import ExactPreview
from chromarpc_server.pipeline.trainer.forward import TrainerLinear, make_modulations
from chromarpc_server.pipeline.trainer.fused import FusedPreview
from chromarpc_server.pipeline.trainer.layer import rank_bucket
from chromarpc_server.pipeline.weights.quantizers import quantize_linear
from tests.pipeline.adapters.conftest import rel, values
from tests.tiny_checkpoint import GOLDENS

CPU = torch.device("cpu")
BASE = GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors"
FLOAT32 = TrainerSettings(dtype="float32")
OLD_LOKR = TrainerSettings(dtype="float32", lokr_form=LokrForm.WEIGHT)
Set = list[tuple[Adapter, float]]

SETS = {
    "none": (),
    "rank 16": (("rank 16", 1.0),),
    "rank 16 at another multiplier": (("rank 16", -0.3),),
    "another of rank 16": (("another of rank 16", 1.0),),
    "rank 100": (("rank 100", 0.8),),
    "several": (("rank 16", 0.7), ("rank 100", -0.4), ("aitk", 1.0)),
    "the same twice": (("rank 16", 0.7), ("rank 16", 0.3)),
    "by rows": (("diffusers_peft", 0.8),),
    "with alphas": (("mixed_rank_alpha", 0.8), ("kohya", 0.5)),
    "lokr": (("aitk_lokr_full", 0.9),),
    "lokr of low rank": (("aitk_lokr_lowrank", 0.9),),
    "lokr and lora": (("aitk_lokr_full", 0.9), ("rank 16", 1.0)),
    "dora": (("kohya_dora", 1.0),),
    "dora over lora": (("rank 16", 1.0), ("kohya_dora", 0.6)),
    "loha": (("loha", 0.7),),
    "full": (("full_diff", 0.5), ("rank 16", 0.5)),
}
"""Adapters and multipliers by name; those with a rank are made here, the others are recorded files."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors as small as these more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def master() -> dict[str, Tensor]:
    return load_file(BASE)


@pytest.fixture(scope="module")
def config(master: dict[str, Tensor]) -> ChromaConfig:
    with safe_open(BASE, "pt") as file:
        return ChromaConfig.from_shapes({name: tensor.shape for name, tensor in master.items()}, file.metadata())


@pytest.fixture(scope="module")
def adapter_set(
    master: dict[str, Tensor], config: ChromaConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Set]:
    shapes = {name: tuple(tensor.shape) for name, tensor in master.items()}
    folder = tmp_path_factory.mktemp("adapters")
    for name, rank, seed in (("rank 16", 16, 1), ("another of rank 16", 16, 2), ("rank 100", 100, 3)):
        tensors = {}
        for weight in linear_weights(config):
            module, (rows, columns) = weight.removesuffix(".weight"), master[weight].shape
            if module.startswith("distilled") and rank == 16:
                continue  # some layers have nothing beside them
            tensors[f"diffusion_model.{module}.lora_A.weight"] = values(rank, columns, seed=seed)
            tensors[f"diffusion_model.{module}.lora_B.weight"] = values(rows, rank, seed=seed + 10)
        save_file(tensors, folder / f"{name}.safetensors")
    known: dict[str, Adapter] = {}

    def read(name: str) -> Adapter:
        if name not in known:
            recorded = GOLDENS / "adapters" / f"{name}.safetensors"
            known[name] = read_adapter(recorded if recorded.is_file() else folder / f"{name}.safetensors", shapes)
        return known[name]

    return lambda name: [(read(one), multiplier) for one, multiplier in SETS[name]]


Build = Callable[..., FusedPreview]


@pytest.fixture
def fused(master: dict[str, Tensor], config: ChromaConfig) -> Build:
    def build(
        adapters: Set | None = None, settings: TrainerSettings = FLOAT32, *, hold_float8: bool = False
    ) -> FusedPreview:
        made = FusedPreview(
            config,
            master,
            PROFILES["preview"],
            settings,
            DevicePlacement(CPU, torch.float32, hold_float8=hold_float8),
        )
        if adapters is not None:
            made.switch(adapters)
        return made

    return build


def exact(
    config: ChromaConfig, master: Mapping[str, Tensor], adapters: Set, settings: TrainerSettings
) -> ExactPreview:
    made = ExactPreview(config, master, PROFILES["preview-exact"], settings, device=CPU)
    made.switch(adapters)
    return made


@torch.inference_mode()
def velocity(model: FusedPreview | ExactPreview) -> Tensor:
    """Of one recorded input."""
    given = load_file(GOLDENS / "cpu_fp32" / "transformer_forward.safetensors")
    grid = (int(given["0.grid"][0]), int(given["0.grid"][1]))
    text = Text(given["0.txt"], given["0.txt_mask"])
    found, _ = model.velocity([text], given["0.timestep"], grid)(given["0.img"], 0)
    return found


def held(model: FusedPreview) -> dict[str, Tensor]:
    """What the forward reads."""
    buffers = {name: tensor for name, tensor in model.model.named_buffers() if tensor is not None}
    return {**dict(model.model.named_parameters()), **buffers}


def assert_same(model: FusedPreview, cold: FusedPreview) -> None:
    found, expected = held(model), held(cold)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
    # Rows that lie further apart may be summed in another order.
    assert rel(velocity(model), velocity(cold)) < 1e-6


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
    model = FusedPreview(config, master, PROFILES["preview"], settings, DevicePlacement(CPU, dtype))
    model.switch([])
    found = model.modulations(timesteps.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found.bfloat16(), torch.cat(expected))
    wide = FusedPreview(
        config, master, PROFILES["preview"], settings, DevicePlacement(CPU, dtype), modulation_dtype=torch.float32
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


def linears(model: FusedPreview) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.model.named_modules() if hasattr(module, "down")}


@pytest.mark.parametrize("hold_float8", [False, True], ids=["dequantized", "float8"])
@pytest.mark.parametrize(
    ("settings", "sequence"),
    [
        (FLOAT32, ["none", "rank 16", "rank 100", "none"]),
        (FLOAT32, ["rank 100", "rank 16", "rank 100"]),
        (FLOAT32, ["several", "the same twice", "by rows", "with alphas", "several"]),
        (FLOAT32, ["lokr", "lokr and lora", "lokr of low rank", "rank 16", "lokr"]),
        (FLOAT32, ["rank 16", "dora over lora", "dora", "loha", "full", "rank 16"]),
        (OLD_LOKR, ["rank 16", "lokr and lora", "lokr", "none", "lokr of low rank", "rank 100"]),
    ],
    ids=lambda value: " to ".join(value) if isinstance(value, list) else "",
)
def test_after_any_switch_everything_is_as_in_a_cold_build(
    settings: TrainerSettings,
    sequence: list[str],
    hold_float8: bool,
    adapter_set: Callable[[str], Set],
    fused: Build,
) -> None:
    model = fused(settings=settings, hold_float8=hold_float8)
    for name in sequence:
        model.switch(adapter_set(name))
        assert model.switch(adapter_set(name)).rewritten_tensors == 0
        assert_same(model, fused(adapter_set(name), settings, hold_float8=hold_float8))


POISON = 7.0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("rank 16", "rank 16 at another multiplier"),
        ("rank 16", "another of rank 16"),
        ("rank 16", "the same twice"),
        ("none", "rank 16"),
        ("rank 100", "none"),
        ("rank 16", "rank 100"),
        ("lokr", "lokr of low rank"),
        ("lokr and lora", "several"),
    ],
)
def test_no_base_weight_is_rewritten_for_what_lies_beside_it(
    before: str, after: str, adapter_set: Callable[[str], Set], fused: Build
) -> None:
    model = fused(adapter_set(before))
    with torch.inference_mode():
        for module in linears(model).values():
            module.weight[:, : module.in_features] = POISON
    model.switch(adapter_set(after))
    for name, module in linears(model).items():
        assert bool((module.weight[:, : module.in_features] == POISON).all()), name


def test_a_merged_kind_rewrites_its_own_layers_only(adapter_set: Callable[[str], Set], fused: Build) -> None:
    model = fused([])
    dora = adapter_set("dora")
    assert model.switch(dora).rewritten_tensors == len(dora[0][0].targets)
    assert model.switch([]).rewritten_tensors == len(dora[0][0].targets)


def test_within_a_bucket_nothing_moves_and_what_was_recorded_goes_on(
    adapter_set: Callable[[str], Set], fused: Build
) -> None:
    model = fused(adapter_set("rank 16"))
    run, variant = model.run, model.run.fused.variant
    places = {name: tensor.data_ptr() for name, tensor in held(model).items()}
    for name in ("rank 16 at another multiplier", "another of rank 16", "the same twice", "rank 16"):
        model.switch(adapter_set(name))
        assert {name: tensor.data_ptr() for name, tensor in held(model).items()} == places
        assert model.run is run
        assert run.fused.variant == variant
    model.switch([])
    assert run.fused.variant != variant, "a step without a path is another one"
    model.switch(adapter_set("rank 16"))
    assert model.run is run, "which is found again"
    assert run.fused.variant == variant
    model.switch(adapter_set("rank 100"))
    assert model.run is not run, "the next bucket needs room"


def test_ranks_are_padded_to_few_sizes() -> None:
    asked = (0, 1, 16, 64, 65, 128, 129, 256, 512, 513, 1024, 1025)
    assert [rank_bucket(rank) for rank in asked] == [0, 64, 64, 64, 128, 128, 256, 256, 512, 1024, 1024, 1536]


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
                config, with_zeros, PROFILES[profile], settings, DevicePlacement(CPU, torch.float32)
            )
        return ExactPreview(config, with_zeros, PROFILES[profile], settings, device=CPU)

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


@pytest.mark.parametrize(
    ("profile", "hold_float8"),
    [("preview", False), ("preview", True), ("preview-exact", False)],
    ids=["preview", "preview in float8", "preview-exact"],
)
def test_a_switch_that_was_stopped_is_repaired_by_the_next(
    profile: str,
    hold_float8: bool,
    master: dict[str, Tensor],
    config: ChromaConfig,
    adapter_set: Callable[[str], Set],
) -> None:
    for first, stopped, last in (
        ("none", "rank 100", "rank 16"),
        ("rank 16", "rank 100", "rank 16"),
        ("rank 16", "another of rank 16", "rank 16"),
        ("rank 16", "dora over lora", "rank 16"),
        ("lokr and lora", "none", "lokr and lora"),
    ):
        counted = _Stop(None)
        _build(profile, config, master, adapter_set(first), hold_float8).switch(
            adapter_set(stopped), LoadContext(check=counted)
        )
        for limit in sorted({0, counted.calls // 2, counted.calls - 1} & set(range(counted.calls))):
            model = _build(profile, config, master, adapter_set(first), hold_float8)
            with pytest.raises(JobCancelled):
                model.switch(adapter_set(stopped), LoadContext(check=_Stop(limit)))
            model.switch(adapter_set(last))
            cold = _build(profile, config, master, adapter_set(last), hold_float8)
            if isinstance(model, FusedPreview) and isinstance(cold, FusedPreview):
                assert_same(model, cold)
            else:
                assert torch.equal(velocity(model), velocity(cold))


def _build(
    profile: str, config: ChromaConfig, master: dict[str, Tensor], adapters: Set, hold_float8: bool
) -> FusedPreview | ExactPreview:
    if profile == "preview-exact":
        return exact(config, master, adapters, FLOAT32)
    made = FusedPreview(
        config, master, PROFILES[profile], FLOAT32, DevicePlacement(CPU, torch.float32, hold_float8=hold_float8)
    )
    made.switch(adapters)
    return made


class _Stop:
    """A check that stops after some calls; None never does."""

    def __init__(self, limit: int | None) -> None:
        self.calls = 0
        self._limit = limit

    def __call__(self) -> None:
        self.calls += 1
        if self._limit is not None and self.calls > self._limit:
            raise JobCancelled("stopped")


def test_what_it_holds_is_counted_with_what_lies_beside(adapter_set: Callable[[str], Set], fused: Build) -> None:
    model = fused([])
    bare = model.size_bytes
    assert bare == sum(tensor.nbytes for tensor in model.model.parameters())
    model.switch(adapter_set("rank 16"))
    beside = sum(64 * (module.in_features + module.weight.shape[0]) * 4 for module in linears(model).values())
    assert model.size_bytes >= bare + beside
    model.switch(adapter_set("lokr"))
    assert model.size_bytes > bare + beside


@pytest.mark.parametrize("profile", ["preview", "preview in float8", "preview-exact"])
def test_what_a_switch_adds_is_foreseen(
    profile: str, master: dict[str, Tensor], config: ChromaConfig, adapter_set: Callable[[str], Set]
) -> None:
    hold_float8 = profile == "preview in float8"
    for settings in (FLOAT32, OLD_LOKR, TrainerSettings(quantize=False, dtype="float32")):
        model = _empty(profile.removesuffix(" in float8"), config, master, settings, hold_float8)
        model.switch([])
        for name in ("rank 16", "none", "lokr", "rank 100", "by rows", "several", "lokr and lora", "none"):
            before, foreseen = model.size_bytes, model.growth_bytes(adapter_set(name))
            model.switch(adapter_set(name))
            grown = model.size_bytes - before
            # What is not foreseen: weights that are held in float8 again, and scales.
            narrowed = hold_float8 and settings is OLD_LOKR
            assert grown <= 1.03 * foreseen, name
            assert narrowed or not foreseen or grown == foreseen, name
            assert model.growth_bytes(adapter_set(name)) == 0


def _empty(
    profile: str, config: ChromaConfig, master: dict[str, Tensor], settings: TrainerSettings, hold_float8: bool
) -> FusedPreview | ExactPreview:
    if profile == "preview-exact":
        return ExactPreview(config, master, PROFILES[profile], settings, device=CPU)
    return FusedPreview(
        config, master, PROFILES[profile], settings, DevicePlacement(CPU, torch.float32, hold_float8=hold_float8)
    )
