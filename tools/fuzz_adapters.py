"""Feeds damaged adapter files to the reader: `python -m tools.fuzz_adapters [--minutes 10] [--seed 0]`.

Starts from the recorded adapters, damages headers and bytes, and demands that every file is either refused with an
error of the tree, in a printable message, or gives an adapter that can be applied; within bounded time and memory.
An input that breaks this is kept in `out/`.
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
from safetensors.torch import load_file

from chromarpc_server.domain.errors import LoraError
from chromarpc_server.pipeline.adapters import read_adapter
from tools.fuzzing import options, search

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "F4", "", "f32")
NUMBERS = (-1, 0, 1, 2, 7, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 1.5, None, "1", True)

Header = dict[str, Any]


def split(raw: bytes) -> tuple[Header, bytes]:
    """A valid file's header and data."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: object, data: bytes) -> bytes:
    """The reverse, whatever the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(header: Header, rng: random.Random) -> tuple[str, Any]:
    name = rng.choice([key for key in header if key != "__metadata__"] or ["none"])
    return name, header.get(name, {})


def _change_entry(rng: random.Random, header: Header, data: bytes) -> bytes:
    name, entry = _entry(header, rng)
    field = rng.choice(["dtype", "shape", "data_offsets", "all"])
    if field == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif field == "all":
        header[name] = rng.choice([None, [], {}, 1, "x", {"dtype": "F32"}, entry])
    else:
        numbers = list(entry.get(field, []))
        place = rng.randrange(len(numbers) + 1)
        numbers[place : place + rng.randrange(2)] = [rng.choice([*NUMBERS, rng.randrange(len(data) + 9)])]
        entry[field] = numbers
    return join(header, data)


def _rename(rng: random.Random, header: Header, data: bytes) -> bytes:
    name, _ = _entry(header, rng)
    other, _ = _entry(header, rng)
    new = rng.choice([
        other, name.upper(), name[::-1], name * 20, name + "\x00", name.replace(".", "_"), "\u202e" + name,
        name.replace("lora", "lokr"), name.replace("A", "B"), "../" + name, "x" * 5000, "", "__metadata__",
    ])  # fmt: skip
    header[new] = header.pop(name, {})
    return join(header, data)


def _duplicate(rng: random.Random, header: Header, data: bytes) -> bytes:
    name, entry = _entry(header, rng)
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    return join(text.encode(), data)


def _metadata(rng: random.Random, header: Header, data: bytes) -> bytes:
    header["__metadata__"] = rng.choice([
        {"a": "b" * rng.randrange(100_000)}, {"a": 1}, [], "x", None, {str(n): "" for n in range(5000)},
        {"lora_adapter_metadata": "{" * 10_000}, {"format": "\x1b[31m"}, {"a": {"b": "c"}},
    ])  # fmt: skip
    return join(header, data)


def _values(rng: random.Random, header: Header, data: bytes) -> bytes:
    spoiled = bytearray(data)
    for _ in range(rng.randrange(1, 20)):
        if spoiled:
            spoiled[rng.randrange(len(spoiled))] = rng.choice([0, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return join(header, bytes(spoiled))


def _bytes(rng: random.Random, header: Header, data: bytes) -> bytes:
    raw = bytearray(join(header, data))
    for _ in range(rng.randrange(1, 6)):
        raw[rng.randrange(min(len(raw), 2000))] = rng.randrange(256)
    return bytes(raw)


def _length(rng: random.Random, header: Header, data: bytes) -> bytes:
    raw = join(header, data)
    return struct.pack("<Q", rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1, len(raw), len(raw) - 8])) + raw[8:]


def _cut(rng: random.Random, header: Header, data: bytes) -> bytes:
    raw = join(header, data)
    return raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.7 else raw + bytes(rng.randrange(100))


def _nest(rng: random.Random, header: Header, data: bytes) -> bytes:
    depth = rng.choice([10, 1000, 100_000])
    return join(b'{"a":' + b"[" * depth + b"]" * depth + b"}", data)


def _drop(rng: random.Random, header: Header, data: bytes) -> bytes:
    for _ in range(rng.randrange(1, 4)):
        header.pop(_entry(header, rng)[0], None)
    return join(header, data)


DAMAGES: tuple[Callable[[random.Random, Header, bytes], bytes], ...] = (
    _change_entry, _change_entry, _rename, _duplicate, _metadata, _values, _bytes, _length, _cut, _nest, _drop,
)  # fmt: skip


def inputs(seed: int) -> Iterator[bytes]:
    """Endless damaged files, the same for the same seed."""
    rng = random.Random(seed)
    good = [
        path.read_bytes()
        for path in sorted((GOLDENS / "adapters").glob("*.safetensors"))
        if ".expected." not in path.name
    ]
    while True:
        raw = rng.choice(good)
        for _ in range(rng.choice([1, 1, 2, 3])):
            try:
                header, data = split(raw)
            except (ValueError, struct.error, RecursionError):
                break
            if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
                break
            raw = rng.choice(DAMAGES)(rng, header, data)
        yield raw


def judge(path: Path, weights: Mapping[str, torch.Tensor]) -> str:
    """What the reader made of a file: the reason of its refusal, or `applied`.

    Raises:
        AssertionError, Exception: what must not happen.
    """
    targets = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    try:
        adapter = read_adapter(path, targets)
    except LoraError as error:
        if not error.message.isprintable() or len(error.message) > 2000:
            raise AssertionError("a message with control characters, or without end") from error
        return error.reason
    assert adapter.targets, "an adapter that changes nothing"
    for name in adapter.targets:
        changed = adapter.apply(name, weights[name], 0.5)
        assert changed.shape == weights[name].shape, "a changed shape"
    return "applied"


def main() -> None:
    """The command line."""
    arguments = options(__doc__)
    weights = load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        cases = ((raw, partial(judge, path, weights)) for raw in inputs(arguments.seed))
        search("fuzz", cases, path, minutes=arguments.minutes, seed=arguments.seed)


if __name__ == "__main__":
    main()
