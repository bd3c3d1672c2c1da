"""The trainer's own text encoders: what they take, how many are kept, where they lie, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chromarpc_server.domain.errors import JobCancelled, WeightsInvalid
from chromarpc_server.domain.trainer import TRAINER_QTYPES, TrainerSettings
from chromarpc_server.pipeline import CheckpointFiles, LoadContext, LoadProgress
from chromarpc_server.pipeline.models.text_encoder import MAX_TOKENS
from chromarpc_server.pipeline.trainer.parts import TrainerParts

CPU = torch.device("cpu")
IDS = torch.arange(MAX_TOKENS)[None] % 60
DIVIDE_BY_ZERO = ("qfloat8", "qfloat8_e5m2")
"""Quanto's float quantizers keep the quotient 0 / 0; an integer has no NaN, and quanto's scale is 0 there."""


@pytest.fixture
def files(tiny_checkpoint: Path) -> CheckpointFiles:
    return CheckpointFiles(
        transformer=tiny_checkpoint / "chroma-mini.safetensors",
        text_encoder=tiny_checkpoint / "text_encoder_2",
        tokenizer=tiny_checkpoint / "tokenizer_2",
        vae=tiny_checkpoint / "vae",
    )


def _parts(files: CheckpointFiles, *, hold_float8: bool = False) -> TrainerParts:
    return TrainerParts(files, CPU, hold_float8=hold_float8, keep_in_host_memory=False, record=False)


ALL = [
    *(TrainerSettings(qtype=qtype) for qtype in TRAINER_QTYPES),
    TrainerSettings(quantize_te=False),
    TrainerSettings(dtype="float32"),
]


@pytest.mark.parametrize("hold_float8", [False, True], ids=["dequantized", "float8"])
@pytest.mark.parametrize("settings", ALL, ids=lambda one: f"{one.qtype}-{one.quantize_te}-{one.dtype}")
def test_a_text_encoder_takes_what_was_foreseen(
    settings: TrainerSettings, hold_float8: bool, files: CheckpointFiles
) -> None:
    parts = _parts(files, hold_float8=hold_float8)
    foreseen = parts.missing_bytes(settings, torch.bfloat16, torch.bfloat16)
    assert parts.size_bytes == 0
    parts.text_encoder(settings)
    assert parts.size_bytes == pytest.approx(foreseen, rel=0.03)  # but for scales
    assert parts.missing_bytes(settings, torch.bfloat16, torch.bfloat16) == 0


def test_an_autoencoder_in_another_dtype_is_foreseen(files: CheckpointFiles) -> None:
    parts, settings = _parts(files), TrainerSettings(dtype="float32")
    without = parts.missing_bytes(settings, torch.float32, torch.float32)
    other = parts.missing_bytes(settings, torch.float32, torch.bfloat16)
    values = load_file(files.vae / "diffusion_pytorch_model.safetensors").values()
    assert other - without == 4 * sum(tensor.numel() for tensor in values)


def test_text_encoders_are_kept_until_somebody_drops_them_and_the_oldest_idle_one_goes_first(
    files: CheckpointFiles,
) -> None:
    parts = _parts(files)
    one, two, three = (TrainerSettings(qtype=qtype) for qtype in ("qfloat8", "qint8", "int8"))
    made = {settings.qtype: parts.text_encoder(settings) for settings in (one, two, three)}
    assert parts.text_encoder(one) is made["qfloat8"]
    assert parts.encoder_count == 3
    whole = parts.size_bytes
    assert parts.idle_bytes([one, two]) == whole - parts.idle_bytes([three])
    assert parts.drop_idle([three])
    assert parts.text_encoder(one) is made["qfloat8"], "it was used after the other"
    assert parts.encoder_count == 2
    assert parts.text_encoder(three) is made["int8"]
    assert not parts.drop_idle([one, three]), "nobody's are left"
    assert parts.text_encoder(two) is not made["qint8"]


def test_making_one_is_told_and_can_be_stopped(files: CheckpointFiles) -> None:
    parts, told = _parts(files), list[LoadProgress]()
    parts.text_encoder(TrainerSettings(), LoadContext(progress=told.append))
    stages = [progress.stage for progress in told]
    assert stages == sorted(stages, key=["reading", "quantizing"].index)
    assert set(stages) == {"reading", "quantizing"}
    for stage in ("reading", "quantizing"):
        last = [progress for progress in told if progress.stage == stage][-1]
        assert last.done_bytes == last.total_bytes
    told.clear()
    parts.text_encoder(TrainerSettings(), LoadContext(progress=told.append))
    assert told == []

    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        parts.text_encoder(TrainerSettings(qtype="qint8"), LoadContext(check=check))
    assert parts.encoder_count == 1


@pytest.mark.parametrize("settings", [TrainerSettings(), TrainerSettings(qtype="int8")], ids=lambda one: one.qtype)
def test_one_that_does_not_fit_the_device_is_copied_over_layer_by_layer_and_embeds_the_same(
    settings: TrainerSettings, files: CheckpointFiles
) -> None:
    asked: list[int] = []

    def fits(size_bytes: int) -> bool:
        asked.append(size_bytes)
        return False

    whole, streamed = _parts(files), dataclasses.replace(_parts(files), fits=fits)
    expected = whole.text_encoder(settings)(IDS)
    encoder = streamed.text_encoder(settings)
    assert torch.equal(encoder(IDS), expected)
    assert asked == [_parts(files).missing_bytes(settings, torch.bfloat16, torch.bfloat16)]
    assert any(module._forward_pre_hooks for module in encoder.model.modules()), "its layers are copied"
    assert not any(module._forward_pre_hooks for module in whole.text_encoder(settings).model.modules())


@pytest.mark.parametrize("qtype", TRAINER_QTYPES)
def test_a_row_of_zeros_of_the_text_encoder_is_refused_where_the_trainer_has_nan(
    qtype: str, files: CheckpointFiles, tmp_path: Path
) -> None:
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    folder = tmp_path / "text_encoder_2"
    shutil.copytree(files.text_encoder, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][2] = 0
    save_file(weights, folder / "model.safetensors")
    parts = _parts(dataclasses.replace(files, text_encoder=folder))
    settings = TrainerSettings(qtype=qtype)
    if qtype in DIVIDE_BY_ZERO:
        with pytest.raises(WeightsInvalid, match=rf"{name.replace('.', '[.]')}.*zeros.*{qtype} turns into NaN"):
            parts.text_encoder(settings)
        assert parts.encoder_count == 0
    else:
        assert bool(torch.isfinite(parts.text_encoder(settings)(IDS)).all())
    assert bool(torch.isfinite(parts.text_encoder(TrainerSettings(quantize_te=False, qtype=qtype))(IDS)).all())
