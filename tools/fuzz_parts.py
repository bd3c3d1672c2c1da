"""Feeds damaged parts of checkpoints to their readers: `python -m tools.fuzz_parts [--minutes 10] [--seed 0]`.

Starts from recorded files of each layout, safetensors and GGUF, damages headers and bytes, and demands that every
file is either refused with `WeightsInvalid`, in a printable message, or gives tensors of the shapes that its
header tells; within bounded time and memory. An input that breaks this is kept in `out/`.
"""

from __future__ import annotations

import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.models.autoencoder import build_autoencoder
from chromarpc_server.pipeline.models.stored_transformer import open_transformer
from chromarpc_server.pipeline.progress import SILENT
from chromarpc_server.pipeline.weights.formats.prefixes import Part
from chromarpc_server.pipeline.weights.loading import ReadingProgress
from chromarpc_server.pipeline.weights.other_parts import open_autoencoder, open_text_encoder
from chromarpc_server.pipeline.weights.shared import WeightFiles
from tools.fuzz_adapters import DAMAGES, GOLDENS, Header, join, split
from tools.fuzzing import options, search

FORMATS = GOLDENS / "formats"
FILES: dict[str, Part] = {
    "t5xxl_fp16.safetensors": "text_encoder",
    "t5xxl_fp8_e4m3fn_scaled.safetensors": "text_encoder",
    "t5-encoder-Q8_0.gguf": "text_encoder",
    "refuse/t5_decoder_too.safetensors": "text_encoder",
    "ae.safetensors": "autoencoder",
    "native_bf16.safetensors": "transformer",
    "fp8_scaled_comfy_quant.safetensors": "transformer",
    "fp8_scaled_metadata.safetensors": "transformer",
    "fp8_scaled_old_prefixed.safetensors": "transformer",
    "int8_convrot.safetensors": "transformer",
    "all_in_one.safetensors": "transformer",
    "diffusers/transformer/diffusion_pytorch_model.safetensors": "transformer",
    "../formats_hashed/q8_0.gguf": "transformer",
    "../formats_hashed/legacy_sdcpp.gguf": "transformer",
}
GGUF_HEADER_BYTES = 5000
"""Of the recorded ones, roughly: where most of their damages are."""
NUMBERS = (0, 1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def _damaged_gguf(rng: random.Random, raw: bytes) -> bytes:
    spoiled = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(min(len(spoiled), GGUF_HEADER_BYTES) or 1)
        match rng.randrange(5):
            case 0:
                width = rng.choice(["<I", "<Q"])
                number = rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(width))
                spoiled[place : place + struct.calcsize(width)] = struct.pack(width, number)
            case 1:
                spoiled[place] = rng.randrange(256)
            case 2:
                del spoiled[rng.randrange(len(spoiled)) :]
            case 3:
                spoiled[place : place + rng.randrange(16)] = rng.randbytes(rng.randrange(16))
            case _:
                spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
        if len(spoiled) < 8:
            break
    return bytes(spoiled)


def _misdescribed(rng: random.Random, header: Header) -> Header:
    """With other words about codes: layers that are not there, formats of no kind, scales of others."""
    metadata = header.setdefault("__metadata__", {})
    layer = rng.choice([*header, "none"]).removesuffix(".weight")
    description = rng.choice([
        {"format": "float8_e4m3fn"}, {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 4**30},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}, {"format": ["x"]}, {}, 1, "x",
        {"format": "float8_e5m2", "params": [1]}, {"format": None},
    ])  # fmt: skip
    metadata["_quantization_metadata"] = json.dumps({"layers": {layer: description}})
    if rng.random() < 0.5:
        sizes = ['{"axes_dim": "x"}', "1e999", "[", '{"axes_dim": [8, 12, 12], "theta": 1e999}']
        metadata["config"] = rng.choice(sizes)
    return header


def inputs(seed: int) -> Iterator[tuple[Part, bytes]]:
    """Endless damaged files and what they are given as, the same for the same seed."""
    rng = random.Random(seed)
    good = {name: (FORMATS / name).read_bytes() for name in FILES}
    while True:
        name = rng.choice(list(good))
        raw = good[name]
        if name.endswith(".gguf"):
            yield FILES[name], _damaged_gguf(rng, raw)
            continue
        header, data = split(raw)
        if rng.random() < 0.1:
            header = _misdescribed(rng, header)
        yield FILES[name], rng.choice(DAMAGES)(rng, header, data) if rng.random() < 0.9 else join(header, data)


OPENERS: Mapping[Part, Callable[[Path, WeightFiles], Any]] = {
    "transformer": open_transformer,
    "text_encoder": open_text_encoder,
    "autoencoder": open_autoencoder,
}


def judge(path: Path, part: Part) -> str:
    """What a reader made of a file: `refused`, or `read`.

    Raises:
        AssertionError, Exception: what must not happen.
    """
    files = WeightFiles()
    try:
        opened = OPENERS[part](path, files)
        weights = ReadingProgress((opened.part,), SILENT).stored(opened.part)
        for name, stored in weights.items():
            assert stored.dense().shape == opened.part.recipes[name].shape, "another shape than the header's"
        if part == "autoencoder":
            build_autoencoder(opened.config, weights, device=torch.device("cpu"), dtype=torch.float32)
    except WeightsInvalid as error:
        if not error.message.isprintable() or len(error.message) > 2000:
            raise AssertionError("a message with control characters, or without end") from error
        return "refused"
    return "read"


def main() -> None:
    """The command line."""
    arguments = options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part"
        path.write_bytes((FORMATS / "ae.safetensors").read_bytes())
        (Path(folder) / "vae_config.json").write_bytes((FORMATS / "vae_config.json").read_bytes())
        judge(path, "autoencoder")  # imports what it needs, which counts as memory
        cases = ((raw, partial(judge, path, part)) for part, raw in inputs(arguments.seed))
        search("fuzz-parts", cases, path, minutes=arguments.minutes, seed=arguments.seed)


if __name__ == "__main__":
    main()
