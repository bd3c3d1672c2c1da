"""The miniature's parts: sizes, construction, and writing them in the layout of Chroma1-Base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.transformer import ChromaTransformer

CONTEXT = 128
SIZES = {
    "full": ChromaConfig(
        in_channels=64,
        context_in_dim=CONTEXT,
        hidden_size=256,
        mlp_ratio=4.0,
        num_heads=4,
        depth=2,
        depth_single_blocks=4,
        axes_dim=(16, 24, 24),
        theta=10_000,
        approximator_in_dim=64,
        approximator_depth=2,
        approximator_hidden_size=96,
    ),
    "small": ChromaConfig(
        in_channels=64,
        context_in_dim=CONTEXT,
        hidden_size=192,
        mlp_ratio=4.0,
        num_heads=4,
        depth=1,
        depth_single_blocks=4,
        axes_dim=(8, 20, 20),
        theta=10_000,
        approximator_in_dim=64,
        approximator_depth=2,
        approximator_hidden_size=96,
    ),
}
"""Of the transformer: the one to ship, and one that a few CPU cores can train."""
TRANSFORMER_FILE = "chroma-mini.safetensors"


def new_autoencoder() -> AutoencoderKL:
    """A small AutoencoderKL of the Flux VAE's shape: 16 channels, 8 pixels a side for each latent."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def new_text_encoder(vocabulary: int) -> T5EncoderModel:
    """A small T5 v1.1 encoder whose attention starts out blind to padding.

    The pipeline runs T5 without a mask, and 490 of 512 positions are padding here. So one channel of embeddings
    marks padding, and every head's first channel takes it off the scores; training starts from there.
    """
    model = T5EncoderModel(
        T5Config(
            d_model=CONTEXT,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            vocab_size=vocabulary,
            dropout_rate=0.0,
        )
    )
    constant, padding = 0, 1
    with torch.no_grad():
        table = model.shared.weight
        table.normal_()
        table[:, constant], table[:, padding] = 2.0, 0.0
        table[0] = 0.0
        table[0, constant], table[0, padding] = 2.0, 11.0
        for block in model.encoder.block:
            attention = block.layer[0].SelfAttention
            for head in range(model.config.num_heads):
                row = head * model.config.d_kv
                attention.q.weight[row], attention.k.weight[row] = 0.0, 0.0
                attention.q.weight[row, constant], attention.k.weight[row, padding] = -4.0, 2.0
            attention.o.weight[: padding + 1] = 0.0
            block.layer[1].DenseReluDense.wo.weight[: padding + 1] = 0.0
    return model


def new_transformer(config: ChromaConfig, device: torch.device) -> ChromaTransformer:
    """A transformer with initial weights: small residual outputs, modulations that start near identity."""
    with torch.device(device):
        model = ChromaTransformer(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 / parameter.shape[1] ** 0.5)
        elif name.endswith("scale"):
            nn.init.ones_(parameter)
        else:
            nn.init.zeros_(parameter)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.normal_(model.distilled_guidance_layer.out_proj.weight, std=0.05)
    nn.init.constant_(model.distilled_guidance_layer.out_proj.bias, 0.1)
    return model


def latent_statistics(model: AutoencoderKL, images: Tensor) -> tuple[float, float]:
    """Scaling and shift that give latents of images (B, 3, h, w) zero mean and unit variance."""
    with torch.no_grad():
        latents = model.encode(images).latent_dist.mean.float()
    return float(1 / latents.std()), float(latents.mean())


def encode_images(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B, 3, h, w) in −1…1 → model-space latents (B, 16, h/8, w/8)."""
    latents: Tensor = model.encode(images).latent_dist.mean
    return (latents - model.config.shift_factor) * model.config.scaling_factor


def fit_preview(latents: Tensor, images: Tensor) -> dict[str, list[object]]:
    """Least squares from latents (B, 16, h, w) to images averaged to their grid."""
    small = nn.functional.interpolate(images, size=latents.shape[-2:], mode="area")
    x = latents.float().permute(0, 2, 3, 1).reshape(-1, 16)
    y = small.float().permute(0, 2, 3, 1).reshape(-1, 3)
    ones = torch.ones(len(x), 1, device=x.device)
    solution = torch.linalg.lstsq(torch.cat([x, ones], dim=1), y).solution
    return {"factors": solution[:16].cpu().tolist(), "bias": solution[16].cpu().tolist()}


def _bf16(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}


def save_autoencoder(model: AutoencoderKL, folder: Path) -> None:
    """Writes config.json and weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    config["_class_name"] = "AutoencoderKL"
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(_bf16(model.state_dict()), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def save_text_encoder(model: T5EncoderModel, folder: Path) -> None:
    """Writes config.json and weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = (
        "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj", "vocab_size",
        "relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "dropout_rate",
    )  # fmt: skip
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    config |= {key: getattr(model.config, key) for key in keys}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    state = {name: t for name, t in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    save_file(_bf16(state), folder / "model.safetensors", {"format": "pt"})


def save_transformer(state: dict[str, Tensor], config: ChromaConfig, path: Path) -> None:
    """Writes native keys in bf16, with the config in the header's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_bf16(state), path, {"format": "pt", "config": config.to_json()})
