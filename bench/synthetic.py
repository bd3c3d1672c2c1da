"""Chroma1-Base, its text encoder and its autoencoder at full size, with random weights that stay finite.

Speed, memory and rounding do not depend on what weights were trained for. `checkpoint` makes one in memory,
`python -m bench.synthetic FOLDER` one on disk, laid out as the Hugging Face repositories are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from bench.switching import FULL
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import Checkpoint
from chromarpc_server.pipeline.fused.decoder import with_fused_decoder
from chromarpc_server.pipeline.models import autoencoder, text_encoder
from chromarpc_server.pipeline.models.text_encoder import Tokenizer
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.preview import LatentPreview
from chromarpc_server.pipeline.progress import SILENT, LoadContext
from chromarpc_server.pipeline.weights.stored import as_they_are

TOKENIZER = Path(__file__).parents[1] / "server" / "chromarpc_server" / "assets" / "chroma_mini" / "tokenizer_2"
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-06,
    "dropout_rate": 0.0,
}
FLUX_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "act_fn": "silu",
    "force_upcast": True,
}


def _random(shapes: Mapping[str, torch.Size], device: torch.device, seed: int) -> Iterator[tuple[str, Tensor]]:
    """bf16: matrices and kernels of standard deviation 0.8 / √fan-in, norms of ones, biases of zeros."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes.items():
        if len(shape) < 2:
            value = 0.0 if name.endswith("bias") else 1.0
            yield name, torch.full(shape, value, dtype=torch.bfloat16, device=device)
            continue
        deviation = 0.8 / shape[1:].numel() ** 0.5
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        yield name, drawn.mul_(deviation)


def _shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _parts() -> tuple[dict[str, torch.Size], dict[str, torch.Size], dict[str, torch.Size]]:
    with torch.device("meta"):
        transformer = _shapes(ChromaTransformer(FULL))
        encoder = _shapes(T5EncoderModel(T5Config(**T5_XXL)))
        vae = _shapes(AutoencoderKL.from_config(FLUX_VAE))
    encoder.pop("encoder.embed_tokens.weight", None)
    return transformer, encoder, vae


class SyntheticParts:
    """`TrainerParts` without files: speed does not depend on how the text encoder is quantized to float8."""

    def __init__(self, encoder: text_encoder.RecordedEncoder) -> None:
        self._encoder = encoder
        self.size_bytes = 0
        self.tokenizer = Tokenizer(TOKENIZER, as_trainer=True)

    def text_encoder(self, _: TrainerSettings, __: LoadContext = SILENT) -> text_encoder.RecordedEncoder:
        return self._encoder

    def missing_bytes(self, _: TrainerSettings, __: torch.dtype, ___: torch.dtype) -> int:
        return 0

    def idle_bytes(self, _: Collection[TrainerSettings]) -> int:
        return 0

    def drop_idle(self, _: Collection[TrainerSettings]) -> bool:
        return False

    def empty(self, _: TrainerSettings, ids: Tensor) -> Tensor:
        return self._encoder(ids)

    def autoencoder(self, _: torch.dtype, like: AutoencoderKL) -> AutoencoderKL:
        return like


def checkpoint(device: torch.device) -> Checkpoint:
    """In memory, everything on the device."""
    transformer, encoder, vae = _parts()
    master = as_they_are(dict(_random(transformer, device, 1)))
    t5 = text_encoder.build_text_encoder(
        T5Config(**T5_XXL), dict(_random(encoder, device, 2)), device=device, dtype=torch.bfloat16, quantize=True
    )
    decoder = autoencoder.build_autoencoder(
        FLUX_VAE, dict(_random(vae, device, 3)), device=device, dtype=torch.bfloat16
    )
    tokenizer = Tokenizer(TOKENIZER)
    empty = tokenizer("")
    encoder = text_encoder.RecordedEncoder(t5)
    return Checkpoint(
        config=FULL,
        master=master,
        stored_as="bf16",
        text_encoder=encoder,
        autoencoder=decoder,
        fused_autoencoder=with_fused_decoder(decoder),
        tokenizer=tokenizer,
        latent_preview=LatentPreview.flux(),
        device=device,
        dtype=torch.bfloat16,
        revision="synthetic",
        size_bytes=sum(t.nbytes for t in master.values()),
        empty=(text_encoder.encode(t5, empty.ids), empty.mask.to(device)),
        trainer_parts=SyntheticParts(encoder),
    )


def write(folder: Path, device: torch.device) -> None:
    """On disk: 28 GB. Made on `device`, where that is quick."""
    transformer, encoder, vae = _parts()
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    save = {
        "Chroma1-Base.safetensors": (transformer, 1, {"config": json.dumps(asdict(FULL))}),
        "text_encoder_2/model.safetensors": (encoder, 2, {"format": "pt"}),
        "vae/diffusion_pytorch_model.safetensors": (vae, 3, {"format": "pt"}),
    }
    for name, (shapes, seed, metadata) in save.items():
        save_file({key: t.cpu() for key, t in _random(shapes, device, seed)}, folder / name, metadata)
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps({"model_type": "t5", **T5_XXL}))
    (folder / "vae" / "config.json").write_text(json.dumps(FLUX_VAE))
    shutil.copy(TOKENIZER / "tokenizer.json", folder / "tokenizer_2" / "tokenizer.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
