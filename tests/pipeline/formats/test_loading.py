"""A part draws the same whatever layout it is given in, and a whole checkpoint of such files draws."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import Checkpoint, CheckpointFiles
from chromarpc_server.pipeline.bundled import t5_tokenizer_folder
from chromarpc_server.pipeline.libraries import libraries
from chromarpc_server.pipeline.models import autoencoder, text_encoder
from chromarpc_server.pipeline.models.text_encoder import MAX_TOKENS, Tokenizer
from chromarpc_server.pipeline.progress import SILENT
from chromarpc_server.pipeline.trainer.parts import TrainerParts
from chromarpc_server.pipeline.weights import reading
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.other_parts import open_autoencoder, open_text_encoder
from chromarpc_server.pipeline.weights.shared import WeightFiles
from tests.pipeline.formats.layouts import FORMATS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
IDS = torch.arange(MAX_TOKENS)[None] % 150
ENCODERS = {
    "t5xxl_fp16.safetensors": "t5_fp16",
    "t5xxl_fp8_e4m3fn.safetensors": "t5_fp8",
    "t5xxl_fp8_e4m3fn_scaled.safetensors": "t5_fp8_scaled",
    "t5-encoder-Q8_0.gguf": "t5_q8_0",
    "all_in_one.safetensors": "t5_fp16",
}


def _expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(FORMATS / "expected" / f"{name}.expected.safetensors")


@pytest.mark.parametrize("file", ENCODERS)
def test_every_layout_of_a_text_encoder_gives_the_same_embeddings(file: str) -> None:
    """As the reference has it: rounded to bf16, then to float8; a GGUF file's norms are float32, and stay so."""
    opened = open_text_encoder(FORMATS / file, WeightFiles())
    built = text_encoder.build_text_encoder(
        text_encoder.text_encoder_config(opened.config),
        ReadingProgress((opened.part,), SILENT).stored(opened.part),
        device=CPU,
        dtype=torch.float32,
        quantize=True,
        rounding=opened.rounding,
    )
    config = json.loads((FORMATS / "t5_config.json").read_text())
    plain = text_encoder.build_text_encoder(
        libraries().t5_config(**config),
        {
            name: tensor if file.endswith(".gguf") and tensor.ndim == 1 else tensor.to(torch.bfloat16)
            for name, tensor in _expected(ENCODERS[file]).items()
        },
        device=CPU,
        dtype=torch.float32,
        quantize=True,
    )
    assert torch.equal(text_encoder.encode(built, IDS), text_encoder.encode(plain, IDS))


@pytest.mark.parametrize("file", ["t5xxl_fp8_e4m3fn_scaled.safetensors", "t5-encoder-Q8_0.gguf"])
@pytest.mark.parametrize(
    "settings", [TrainerSettings(), TrainerSettings(quantize_te=False)], ids=["float8", "bf16"]
)
def test_the_trainers_text_encoder_comes_from_the_same_files(
    file: str, settings: TrainerSettings, tmp_path: Path
) -> None:
    def encoded(place: Path) -> torch.Tensor:
        files = CheckpointFiles(Path(), place, Path(), FORMATS / "ae.safetensors")
        parts = TrainerParts(files, CPU, hold_float8=False, keep_in_host_memory=False, record=False)
        foreseen = parts.missing_bytes(settings, torch.bfloat16, torch.bfloat16)
        embeds = parts.text_encoder(settings)(IDS)
        assert parts.size_bytes == foreseen
        return embeds

    save_file(_expected(ENCODERS[file]), tmp_path / "model.safetensors")
    shutil.copy(FORMATS / "t5_config.json", tmp_path / "config.json")
    assert torch.equal(encoded(FORMATS / file), encoded(tmp_path))


@pytest.mark.parametrize("file", ["ae.safetensors", "all_in_one.safetensors"])
def test_every_layout_of_an_autoencoder_gives_the_same_pixels(file: str) -> None:
    opened = open_autoencoder(FORMATS / file, WeightFiles())
    stored = ReadingProgress((opened.part,), SILENT).stored(opened.part)
    built = autoencoder.build_autoencoder(opened.config, stored, device=CPU, dtype=torch.float32)
    config = json.loads((FORMATS / "vae_config.json").read_text())
    plain = autoencoder.build_autoencoder(config, _expected("vae"), device=CPU, dtype=torch.float32)
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(autoencoder.decode(built, latents), autoencoder.decode(plain, latents))


def _tiny(tiny_checkpoint: Path, **parts: Path) -> CheckpointFiles:
    places = {
        "transformer": tiny_checkpoint / "chroma-mini.safetensors",
        "text_encoder": tiny_checkpoint / "text_encoder_2",
        "tokenizer": tiny_checkpoint / "tokenizer_2",
        "vae": tiny_checkpoint / "vae",
    }
    return CheckpointFiles(**{**places, **parts})


def _load(files: CheckpointFiles) -> Checkpoint:
    assert not files.missing()
    return Checkpoint.load(files, device=CPU, dtype=torch.float32)


def test_a_decoder_in_the_text_encoders_file_is_left_out_and_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_checkpoint / "text_encoder_2" / "model.safetensors")
    single = tmp_path / "t5.safetensors"
    save_file(weights, single)
    whole = tmp_path / "t5_with_decoder.safetensors"
    save_file({**weights, "decoder.final_layer_norm.weight": torch.ones(48)}, whole)
    plain = _load(_tiny(tiny_checkpoint))
    assert not plain.left_out
    from_file, from_whole = (_load(_tiny(tiny_checkpoint, text_encoder=path)) for path in (single, whole))
    assert "the decoder's 1 tensors" in from_whole.left_out
    for loaded in (from_file, from_whole):
        assert torch.equal(loaded.empty[0], plain.empty[0])


@pytest.mark.parametrize(
    ("part", "file", "message"),
    [
        ("text_encoder", "t5xxl_fp16.safetensors", "64 channels of text, and chroma-mini.safetensors takes 48"),
        ("text_encoder", "refuse/clip_l.safetensors", "this is a CLIP text encoder"),
        ("vae", "t5xxl_fp16.safetensors", "this is a T5 text encoder"),
        ("transformer", "ae.safetensors", "this is an autoencoder"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    part: str, file: str, message: str, tiny_checkpoint: Path
) -> None:
    with pytest.raises(WeightsInvalid, match=message):
        Checkpoint.load(_tiny(tiny_checkpoint, **{part: FORMATS / file}), device=CPU, dtype=torch.float32)


def test_a_tokenizer_with_more_pieces_than_the_text_encoder_knows_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(WeightsInvalid, match="has 32100 pieces, and the text encoder knows 200"):
        _load(_tiny(tiny_checkpoint, tokenizer=t5_tokenizer_folder()))


def test_a_tokenizer_is_a_file_a_folder_or_t5s_own_sentencepiece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = t5_tokenizer_folder()
    older = tmp_path / "tokenizer"
    older.mkdir()
    (older / "spiece.model").write_bytes(b"pieces")
    assert reading.tokenizer_file(older) == older / "tokenizer.json", "another one than T5's"
    monkeypatch.setattr(reading, "SENTENCEPIECE_SHA256", hashlib.sha256(b"pieces").hexdigest())
    for place in (bundled, bundled / "tokenizer.json", older):
        assert Tokenizer(place)("a cat").ids[0, :4].tolist() == [3, 9, 1712, 1]


def _original(name: str) -> str:
    """The original layout's name of one of diffusers', of an autoencoder with four blocks."""
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"mid_block\.attentions\.0\.(?:to_)?(\w+?)(?:\.0)?\.(weight|bias)$", r"mid.attn_1.\1.\2", name)
    name = name.replace("attn_1.out.", "attn_1.proj_out.").replace("attn_1.group_norm", "attn_1.norm")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def test_one_file_can_be_the_whole_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As ComfyUI saves a checkpoint; what the autoencoder's tensors do not show lies beside it."""
    single = tmp_path / "whole.safetensors"
    transformer = tiny_checkpoint / "chroma-mini.safetensors"
    with safe_open(transformer, "pt") as file:
        config = file.metadata()
    encoder = load_file(tiny_checkpoint / "text_encoder_2" / "model.safetensors")
    pixels = load_file(tiny_checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    whole = {
        **{f"model.diffusion_model.{name}": tensor for name, tensor in load_file(transformer).items()},
        **{f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in encoder.items()},
        **{
            f"vae.{_original(name)}": tensor[:, :, None, None]
            if ".attentions." in name and tensor.ndim == 2
            else tensor
            for name, tensor in pixels.items()
        },
    }
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, single, config)
    shutil.copy(tiny_checkpoint / "vae" / "config.json", tmp_path / "vae_config.json")
    plain = _load(_tiny(tiny_checkpoint))
    loaded = _load(_tiny(tiny_checkpoint, transformer=single, text_encoder=single, vae=single))
    assert torch.equal(loaded.empty[0], plain.empty[0])
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn, expected = (autoencoder.decode(one.autoencoder, latents) for one in (loaded, plain))
    assert torch.equal(drawn, expected)
    assert {name: stored.dense().tolist() for name, stored in loaded.master.items() if stored.ndim == 1} == {
        name: stored.dense().tolist() for name, stored in plain.master.items() if stored.ndim == 1
    }


def test_a_text_encoder_scaled_in_the_new_layout_is_the_one_scaled_in_the_old(tmp_path: Path) -> None:
    description = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    new: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(FORMATS / "t5xxl_fp8_e4m3fn_scaled.safetensors").items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "scale_weight":
            new |= {f"{layer}.weight_scale": tensor, f"{layer}.comfy_quant": description.clone()}
        elif leaf == "scale_input":
            new[f"{layer}.input_scale"] = tensor
        elif name != "scaled_fp8":
            new[name] = tensor
    save_file(new, tmp_path / "t5.safetensors")
    opened = open_text_encoder(tmp_path / "t5.safetensors", WeightFiles())
    expected = _expected("t5_fp8_scaled")
    stored = ReadingProgress((opened.part,), SILENT).stored(opened.part)
    assert set(stored) == set(expected)
    assert all(torch.equal(tensor.dense(), expected[name]) for name, tensor in stored.items())
    assert opened.part.stored_as == "fp8 scaled"
