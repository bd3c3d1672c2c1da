"""A checkpoint of a few hundred kilobytes in the layout of Chroma1-Base, made from the recorded tiny weights."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Unigram

GOLDENS = Path(__file__).parent / "goldens"


def _config(path: Path) -> dict[str, object]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"])


def write_tiny_checkpoint(folder: Path) -> Path:
    """Writes transformer, text encoder, tokenizer and autoencoder below `folder`; the weights draw noise."""
    recorded = GOLDENS / "cpu_fp32"
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        (folder / name).mkdir(parents=True)
    transformer = recorded / "transformer_tiny.safetensors"
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(transformer).items()}
    save_file(weights, folder / "chroma-mini.safetensors", {"config": json.dumps(_config(transformer))})

    text = recorded / "t5_tiny.safetensors"
    save_file(load_file(text), folder / "text_encoder_2" / "model.safetensors")
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps({"model_type": "t5", **_config(text)}))

    vae = recorded / "vae_tiny.safetensors"
    save_file(load_file(vae), folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "vae" / "config.json").write_text(json.dumps(_config(vae)))

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in string.ascii_letters + string.digits + string.punctuation]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(folder / "tokenizer_2" / "tokenizer.json"))
    return folder
