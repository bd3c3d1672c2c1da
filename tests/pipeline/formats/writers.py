"""Writes a transformer in every format that people have it in, from its native bf16 tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from torch import Tensor

Weights = Mapping[str, Tensor]

FLOAT8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def _is_quantized(name: str, tensor: Tensor) -> bool:
    return "_blocks." in name and tensor.ndim == 2


def fp16(weights: Weights, config: str, path: Path) -> Path:
    save_file({name: tensor.half() for name, tensor in weights.items()}, path, {"config": config})
    return path


def raw_float8(weights: Weights, config: str, path: Path) -> Path:
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights.items()}, path, {"config": config})
    return path


def scaled_float8(weights: Weights, config: str, path: Path, *, layout: str = "comfy_quant") -> Path:
    """`layout`: `old`, `comfy_quant` or `metadata`."""
    written: dict[str, Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    for name, tensor in weights.items():
        if not _is_quantized(name, tensor):
            written[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.float().abs().max() / FLOAT8_MAX[torch.float8_e4m3fn]
        written[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        written[f"{layer}.{'scale_weight' if layout == 'old' else 'weight_scale'}"] = scale
        description = {"format": "float8_e4m3fn"}
        if layout == "comfy_quant":
            text = json.dumps(description).encode()
            written[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        layers[layer] = description
    metadata = {"config": config}
    if layout == "old":
        written["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    if layout == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(written, path, metadata)
    return path


def as_gguf(
    weights: Weights, config: str, path: Path, kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0
) -> Path:
    """Norms and biases in float32, rows that blocks do not make in fp16, as llama.cpp's tools leave them."""
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_string("config", config)
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    for name, tensor in weights.items():
        values = tensor.float().numpy()
        if tensor.ndim < 2:
            writer.add_tensor(name, values)
        elif not _is_quantized(name, tensor):
            bits = tensor.bfloat16().view(torch.uint8).numpy().reshape(tensor.shape[0], -1)
            writer.add_tensor(name, bits, raw_dtype=GGMLQuantizationType.BF16)
        elif tensor.shape[1] % block:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            codes = q6_k(values) if kind is GGMLQuantizationType.Q6_K else gguf.quantize(values, kind)
            writer.add_tensor(name, codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q6_k(values: np.ndarray) -> np.ndarray:
    """Blocks of 256: codes of 6 bits, a scale of 8 bits for each 16 of them, and one fp16 scale for those.

    The gguf package dequantizes K-quants and writes none.
    """
    blocks = values.reshape(-1, 16, 16)
    largest = np.abs(blocks).max(axis=2)
    whole = (np.maximum(largest.max(axis=1), 1e-6) / (31 * 127)).astype(np.float16)
    scales = np.ceil(largest / (31 * whole[:, None].astype(np.float32))).clip(1, 127).astype(np.int8)
    steps = scales[:, :, None] * whole[:, None, None].astype(np.float32)
    codes = (np.round(blocks / steps).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    # Half a block holds 128 values: 64 bytes with the low halves of n and n + 64, and 32 with the rest of four.
    packed_low = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2)
    packed_high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    count = len(blocks)
    block = [
        packed_low.reshape(count, -1), packed_high.reshape(count, -1), scales.view(np.uint8),
        whole.view(np.uint8).reshape(count, 2),
    ]  # fmt: skip
    return np.concatenate(block, axis=1).reshape(values.shape[0], -1)


def diffusers_names(weights: Weights) -> dict[str, Tensor]:
    """diffusers' names, with query, key, value and MLP apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stem, _, leaf = name.rpartition(".")
        for pattern, new in _DIFFUSERS:
            if match := re.fullmatch(pattern, stem):
                names = [f"{match.expand(one)}.{'weight' if leaf == 'scale' else leaf}" for one in new]
                hidden = weights[name.replace(stem, "img_in")].shape[0] if len(new) > 1 else tensor.shape[0]
                sizes = [hidden] * 3 + [tensor.shape[0] - 3 * hidden] * (len(new) > 3)
                found.update(zip(names, tensor.split(sizes) if len(new) > 1 else [tensor], strict=True))
                break
        else:
            raise KeyError(name)
    return {name: tensor.contiguous() for name, tensor in found.items()}


_DOUBLE, _SINGLE = r"double_blocks\.(\d+)\.", r"single_blocks\.(\d+)\."
_TWICE, _ONCE = r"transformer_blocks.\1.", r"single_transformer_blocks.\1."
_DIFFUSERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("img_in", ("x_embedder",)),
    ("txt_in", ("context_embedder",)),
    (r"final_layer\.linear", ("proj_out",)),
    (r"(distilled_guidance_layer\.layers\.\d+)\.in_layer", (r"\1.linear_1",)),
    (r"(distilled_guidance_layer\.layers\.\d+)\.out_layer", (r"\1.linear_2",)),
    (r"(distilled_guidance_layer\.(norms\.\d+|in_proj|out_proj))", (r"\1",)),
    (_DOUBLE + r"img_attn\.qkv", tuple(f"{_TWICE}attn.to_{one}" for one in "qkv")),
    (_DOUBLE + r"txt_attn\.qkv", tuple(f"{_TWICE}attn.add_{one}_proj" for one in "qkv")),
    (_DOUBLE + r"img_attn\.proj", (f"{_TWICE}attn.to_out.0",)),
    (_DOUBLE + r"txt_attn\.proj", (f"{_TWICE}attn.to_add_out",)),
    (_DOUBLE + r"img_attn\.norm\.query_norm", (f"{_TWICE}attn.norm_q",)),
    (_DOUBLE + r"img_attn\.norm\.key_norm", (f"{_TWICE}attn.norm_k",)),
    (_DOUBLE + r"txt_attn\.norm\.query_norm", (f"{_TWICE}attn.norm_added_q",)),
    (_DOUBLE + r"txt_attn\.norm\.key_norm", (f"{_TWICE}attn.norm_added_k",)),
    (_DOUBLE + r"img_mlp\.0", (f"{_TWICE}ff.net.0.proj",)),
    (_DOUBLE + r"img_mlp\.2", (f"{_TWICE}ff.net.2",)),
    (_DOUBLE + r"txt_mlp\.0", (f"{_TWICE}ff_context.net.0.proj",)),
    (_DOUBLE + r"txt_mlp\.2", (f"{_TWICE}ff_context.net.2",)),
    (_SINGLE + "linear1", (*(f"{_ONCE}attn.to_{one}" for one in "qkv"), f"{_ONCE}proj_mlp")),
    (_SINGLE + "linear2", (f"{_ONCE}proj_out",)),
    (_SINGLE + r"norm\.query_norm", (f"{_ONCE}attn.norm_q",)),
    (_SINGLE + r"norm\.key_norm", (f"{_ONCE}attn.norm_k",)),
)


def diffusers_folder(
    weights: Weights, config: str, path: Path, *, shards: int = 2, indexed: bool = True, configured: bool = True
) -> Path:
    path.mkdir(parents=True)
    named = diffusers_names(weights)
    names = sorted(named)
    index: dict[str, str] = {}
    for number in range(shards):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: named[name] for name in names[number::shards]}
        save_file(part, path / file, {"format": "pt"} if configured else {"format": "pt", "config": config})
        index |= dict.fromkeys(part, file)
    if indexed:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    if configured:
        sizes = {"_class_name": "ChromaTransformer2DModel", "axes_dims_rope": json.loads(config)["axes_dim"]}
        (path / "config.json").write_text(json.dumps(sizes))
    return path


def all_in_one(weights: Weights, config: str, path: Path, others: Mapping[str, Weights] | None = None) -> Path:
    """`others`: a prefix to tensors of another part."""
    written = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    for prefix, tensors in (others or {}).items():
        written |= {f"{prefix}{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(written, path, {"config": config})
    return path


FORMATS: Mapping[str, tuple[str, Callable[[Weights, str, Path], Path]]] = {
    "fp16": ("fp16", fp16),
    "raw fp8": ("fp8", raw_float8),
    "fp8 scaled, old": ("fp8 scaled", lambda w, c, p: scaled_float8(w, c, p, layout="old")),
    "fp8 scaled, new": ("fp8 scaled", scaled_float8),
    "GGUF Q8_0": ("GGUF Q8_0", as_gguf),
    "GGUF Q4_0": ("GGUF Q4_0", lambda w, c, p: as_gguf(w, c, p, GGMLQuantizationType.Q4_0)),
    "diffusers": ("bf16", diffusers_folder),
    "all in one": ("bf16", all_in_one),
}
"""What `stored_as` says of each, and what writes it."""
