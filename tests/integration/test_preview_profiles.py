"""The trainer's own picture, asked for by a real client of a real server, on chroma-mini."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import chromarpc
from chromarpc import AdapterPlacement, Lora, TrainerOptions
from chromarpc_server import settings as settings_module
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.pipeline.models.text_encoder import RecordedEncoder
from chromarpc_server.pipeline.trainer.parts import TrainerParts
from tests.conftest import RunningServer, start_server

ASSETS = Path(settings_module.__file__).parent / "assets" / "loras"
LORA = Lora("hollow_shapes.safetensors")
WHOLE = Lora("whole.safetensors")
LOKR = Lora("lokr.safetensors")
SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 2,
    "guidance_scale": 4.0,
}
PROFILES = ("preview", "preview-exact")


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With the checkpoint that ships, on one thread: here more only wait for each other."""
    root = tmp_path_factory.mktemp("loras")
    shutil.copy(ASSETS / LORA.path, root)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(1536, 64, generator=generator)
    save_file({"diffusion_model.img_in.diff": change[: _img_in_rows()] * 0.05}, root / WHOLE.path)
    save_file(_lokr(generator), root / LOKR.path)
    threads = torch.get_num_threads()
    running = start_server(lora_root=root, data_dir=tmp_path_factory.mktemp("data"), grace_s=0, threads=1)
    yield running
    running.stop()
    torch.set_num_threads(threads)


def _lokr(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A LoKr on the linear layers of every block, as the trainer names it."""
    from safetensors import safe_open

    tensors = {}
    with safe_open(ASSETS.parent / "chroma_mini" / "chroma-mini.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            shape = file.get_slice(name).get_shape()
            if "_blocks." in name and name.endswith(".weight") and len(shape) == 2:
                module = f"diffusion_model.{name.removesuffix('.weight')}"
                first, second = torch.randn(4, 4, generator=generator), (shape[0] // 4, shape[1] // 4)
                tensors[f"{module}.lokr_w1"] = first * 0.3
                tensors[f"{module}.lokr_w2"] = torch.randn(*second, generator=generator) * 0.01
    return tensors


def _img_in_rows() -> int:
    from safetensors import safe_open

    with safe_open(ASSETS.parent / "chroma_mini" / "chroma-mini.safetensors", "pt") as file:
        return int(file.get_slice("img_in.weight").get_shape()[0])


def _events(server: RunningServer, **arguments: Any) -> list[chromarpc.Event]:
    with chromarpc.Client(server.target) as client:
        return list(client.generate(arguments.pop("prompts", "a large red circle"), **{**SMALL, **arguments}))


def _only(events: list[chromarpc.Event], kind: type[Any]) -> Any:
    (found,) = [event for event in events if isinstance(event, kind)]
    return found


def _picture(server: RunningServer, **arguments: Any) -> np.ndarray[Any, Any]:
    with chromarpc.Client(server.target) as client:
        (image,) = client.generate_images(arguments.pop("prompts", "a large red circle"), **{**SMALL, **arguments})
    return np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB"), dtype=np.float64)


def _difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one - other).mean())


@pytest.mark.parametrize("profile", PROFILES)
def test_a_request_is_resolved_as_the_trainers_config_would_be(mini: RunningServer, profile: str) -> None:
    events = _events(mini, profile=profile, width=72, height=109, loras=[LORA, WHOLE])
    accepted = _only(events, chromarpc.Accepted)
    assert accepted.trainer == TrainerOptions(
        quantize=True, qtype="qfloat8", quantize_te=True, dtype="bf16", lokr_form="factorized"
    )
    assert [(prompt.width, prompt.height) for prompt in accepted.prompts] == [(64, 96)]
    snapped = [warning.message for warning in accepted.warnings if warning.code == "SIZE_SNAPPED"]
    assert len(snapped) == 2
    assert all(profile in message for message in snapped)
    adapters = _only(events, chromarpc.Prepared).adapters
    assert [adapter.placement for adapter in adapters] == [AdapterPlacement.BESIDE, AdapterPlacement.MERGED]
    assert isinstance(events[-1], chromarpc.Completed)


@pytest.mark.parametrize("profile", PROFILES)
def test_negative_text_changes_the_picture(mini: RunningServer, profile: str) -> None:
    events = _events(mini, profile=profile, neg="blue")
    accepted = _only(events, chromarpc.Accepted)
    assert "NEG_IGNORED" not in {warning.code for warning in accepted.warnings}
    assert accepted.prompts[0].neg == "blue"
    plain, again, negative = (_picture(mini, profile=profile, neg=neg) for neg in (None, "", "blue"))
    assert _difference(plain, again) == 0
    assert _difference(plain, negative) > 1


@pytest.mark.parametrize("profile", PROFILES)
def test_the_trainers_settings_change_the_picture(mini: RunningServer, profile: str) -> None:
    usual = _picture(mini, profile=profile, loras=LORA)
    coarse = _picture(mini, profile=profile, loras=LORA, trainer=TrainerOptions(qtype="qint2"))
    assert _difference(usual, coarse) > 1
    bare = TrainerOptions(quantize=False)
    events = _events(mini, profile=profile, loras=LORA, trainer=bare)
    assert _only(events, chromarpc.Accepted).trainer.quantize_te is False, "as `quantize`"
    assert _only(events, chromarpc.Prepared).adapters[0].placement is AdapterPlacement.MERGED
    assert _difference(usual, _picture(mini, profile=profile, loras=LORA, trainer=bare)) < 8


def test_both_profiles_draw_one_picture_and_the_reference_another(mini: RunningServer) -> None:
    options = {"loras": Lora(LORA.path, 0.9), "sample_steps": 6, "neg": "red"}
    fused, exact, reference = (_picture(mini, profile=name, **options) for name in (*PROFILES, "reference"))
    assert _difference(fused, exact) < 3
    assert _difference(reference, exact) > 2 * _difference(fused, exact)


@pytest.mark.parametrize("profile", PROFILES)
def test_another_multiplier_draws_what_a_cold_server_draws(mini: RunningServer, profile: str) -> None:
    before = _picture(mini, profile=profile, loras=Lora(LORA.path, 0.5))
    other = _picture(mini, profile=profile, loras=Lora(LORA.path, 1.5))
    events = _events(mini, profile=profile, loras=Lora(LORA.path, 0.5))
    assert _only(events, chromarpc.Prepared).weights is not None
    assert _difference(before, other) > 0.5
    assert _difference(before, _picture(mini, profile=profile, loras=Lora(LORA.path, 0.5))) == 0


@pytest.mark.parametrize("qtype", ["convrot4", "nvfp4", "orbit2"])
def test_what_is_not_built_is_refused_by_name(mini: RunningServer, qtype: str) -> None:
    with pytest.raises(chromarpc.InvalidRequest) as caught:
        _events(mini, profile="preview", trainer=TrainerOptions(qtype=qtype))
    (violation,) = caught.value.violations
    assert (violation.field, violation.description) == ("trainer.qtype", f"{qtype!r} is known, and not built")


def test_another_profile_ignores_the_trainers_settings_and_says_so(mini: RunningServer) -> None:
    accepted = _only(_events(mini, profile="reference", trainer=TrainerOptions(qtype="qint8")), chromarpc.Accepted)
    assert accepted.trainer is None
    assert "TRAINER_OPTIONS_IGNORED" in {warning.code for warning in accepted.warnings}


def _profiles(server: RunningServer) -> set[str]:
    with chromarpc.Client(server.target) as client:
        served = {profile.id for profile in client.server_info().profiles}
        for model in client.list_models():
            assert {profile.id for profile in model.profiles} == served
    return served


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_the_exact_preview_is_not_served_in_another_dtype_than_the_trainers(
    serve: Callable[..., RunningServer], dtype: str
) -> None:
    server = serve(dtype=dtype)
    assert ("preview-exact" in _profiles(server)) == (dtype != "float32")
    assert "preview" in _profiles(server)
    if dtype == "float32":
        with pytest.raises(chromarpc.InvalidRequest) as caught:
            _events(server, profile="preview-exact")
        assert [violation.field for violation in caught.value.violations] == ["profile"]


async def test_a_server_whose_default_it_would_be_does_not_start(tmp_path: Path) -> None:
    from chromarpc_server.app import App
    from chromarpc_server.settings import ServerSettings

    settings = ServerSettings(port=0, device="cpu", dtype="float32", profile="preview-exact", data_dir=tmp_path)
    with pytest.raises(InvalidParameter, match=r"preview-exact computes in bfloat16.*--dtype says float32"):
        await App(settings).run()


def test_a_preloaded_preview_is_the_one_that_requests_find(serve: Callable[..., RunningServer]) -> None:
    server = serve(profile="preview", preload=["chroma-mini"])
    assert _only(_events(server), chromarpc.Prepared).weights.source == "resident"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Quantizers of the text encoders that are made."""
    qtypes: list[str] = []
    build = TrainerParts._build

    def counted(parts: TrainerParts, qtype: str | None, *others: Any) -> RecordedEncoder:
        qtypes.append(str(qtype))
        return build(parts, qtype, *others)

    monkeypatch.setattr(TrainerParts, "_build", counted)
    return qtypes


def test_a_text_encoder_is_made_for_jobs_and_for_nothing_else(
    serve: Callable[..., RunningServer], made: list[str]
) -> None:
    server = serve()
    for qtype in ("qfloat8", "qint8", "qint8", "qfloat8"):  # two sets are resident, and what is told looks at both
        _events(server, profile="preview", trainer=TrainerOptions(qtype=qtype))
    assert made == ["qfloat8", "qint8"]


@pytest.mark.parametrize(("prepared_bytes", "times"), [(None, 1), (1, 2)], ids=["roomy", "short"])
def test_a_job_is_told_of_the_text_encoder_that_is_made_for_it(
    prepared_bytes: int | None, times: int, serve: Callable[..., RunningServer], made: list[str]
) -> None:
    server = serve(prepared_bytes=prepared_bytes)
    _events(server, profile="reference")  # reads the model

    def read(qtype: str) -> bool:
        events = _events(server, profile="preview", trainer=TrainerOptions(qtype=qtype))
        stages = {str(event.stage) for event in events if isinstance(event, chromarpc.Loading)}
        assert "reading" not in stages or "quantizing" in stages
        return "reading" in stages

    assert [read(qtype) for qtype in ("qfloat8", "qint8", "qfloat8")] == [True, True, times == 2]
    assert made.count("qfloat8") == times


@pytest.mark.parametrize("profile", PROFILES)
def test_the_form_of_a_lokr_changes_the_picture_and_is_told(mini: RunningServer, profile: str) -> None:
    def events(form: str) -> list[chromarpc.Event]:
        return _events(mini, profile=profile, loras=LOKR, trainer=TrainerOptions(lokr_form=form))

    for form, placement in (("factorized", AdapterPlacement.BESIDE), ("weight", AdapterPlacement.MERGED)):
        found = events(form)
        assert _only(found, chromarpc.Accepted).trainer.lokr_form == form
        assert _only(found, chromarpc.Prepared).adapters[0].placement is placement
    usual, factorized, weight = (
        _picture(mini, profile=profile, loras=LOKR, trainer=TrainerOptions(lokr_form=form))
        for form in (None, "factorized", "weight")
    )
    assert _difference(usual, factorized) == 0
    assert 0 < _difference(factorized, weight) < 8


def test_a_form_without_a_quantized_model_is_told_to_have_no_effect(mini: RunningServer) -> None:
    trainer = TrainerOptions(quantize=False, lokr_form="weight")
    accepted = _only(_events(mini, profile="preview", loras=LOKR, trainer=trainer), chromarpc.Accepted)
    told = {(warning.code, warning.field) for warning in accepted.warnings}
    assert ("TRAINER_OPTIONS_IGNORED", "trainer.lokr_form") in told
