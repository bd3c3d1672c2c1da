"""GGUF files that nobody vouches for: each is refused by name, quickly, and without allocating what it claims."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from chromarpc_server.domain.errors import WeightsInvalid
from chromarpc_server.pipeline.weights import gguf_file
from chromarpc_server.pipeline.weights.formats.codes import file_recipes
from chromarpc_server.pipeline.weights.gguf_file import GgufFile, open_gguf
from chromarpc_server.pipeline.weights.reading import open_weights
from chromarpc_server.pipeline.weights.staging import read_onto
from chromarpc_server.pipeline.weights.tensor_file import TensorFileError
from tests.pipeline.formats.layouts import FORMATS

CPU = torch.device("cpu")


def _text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def _key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _tensor(name: bytes | str, sizes: Sequence[int] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def _file(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join((*keys, *tensors))
    return head + bytes(-len(head) % alignment) + data


ARRAY, STRING, UINT32 = 9, 8, 4
FILES: dict[str, tuple[bytes, str]] = {
    "nothing after the magic": (b"GGUF", "not a GGUF file"),
    "version 1": (_file(version=1), "of version 1"),
    "version 4": (_file(version=4), "of version 4"),
    "big-endian": (_file(version=0x03000000), "of a big-endian machine"),
    "tensors without end": (_file(counts=(2**63, 0)), "tensors, more than"),
    "keys without end": (_file(counts=(0, 2**63)), "keys, more than"),
    "tensors that are not there": (_file(counts=(5, 0))[:24], "truncated within its header"),
    "a key's name without end": (_file([struct.pack("<Q", 2**60)]), "truncated within its header"),
    "a long name": (_file([_key("a" * 70_000, UINT32, bytes(4))]), "a name of 70000 bytes"),
    "a name of nothing": (_file([_key("", UINT32, bytes(4))]), "a name of 0 bytes"),
    "a name that is no text": (_file([_key(b"\xff", UINT32, bytes(4))]), "not text"),
    "a key of no type": (_file([_key("a", 99, bytes(8))]), "'a' is of a type that is not known: 99"),
    "the same key twice": (_file([_key("a", UINT32, bytes(4))] * 2), "same key twice: 'a'"),
    "arrays of arrays": (_file([_key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "arrays of arrays"),
    "an array without end": (_file([_key("a", ARRAY, struct.pack("<IQ", UINT32, 2**62))]), "truncated"),
    "texts without end": (_file([_key("a", ARRAY, struct.pack("<IQ", STRING, 2**62))]), "texts, more than"),
    "an alignment of nothing": (_file([_key("general.alignment", UINT32, struct.pack("<I", 0))]), "alignment"),
    "an alignment of 7": (_file([_key("general.alignment", UINT32, struct.pack("<I", 7))]), "alignment"),
    "an alignment of gigabytes": (
        _file([_key("general.alignment", UINT32, struct.pack("<I", 2**31))]),
        "alignment",
    ),
    "an alignment of text": (_file([_key("general.alignment", STRING, _text("32 "))]), "alignment"),
    "a tensor of no type": (_file(tensors=[_tensor("a", kind=99)], data=bytes(32)), "'a' is of a type"),
    "hundred dimensions": (_file(tensors=[_tensor("a", [1] * 100)], data=bytes(32)), "'a' has 100 dimensions"),
    "the same tensor twice": (_file(tensors=[_tensor("a"), _tensor("a")], data=bytes(64)), "same name twice: 'a'"),
    "a product that overflows": (_file(tensors=[_tensor("a", [2**62, 2**62])]), "'a' has a shape"),
    "exabytes": (_file(tensors=[_tensor("a", [2**59])], data=bytes(32)), "truncated: its tensors claim"),
    "an offset beyond everything": (
        _file(tensors=[_tensor("a", offset=2**63)], data=bytes(32)),
        "'a' has a shape",
    ),
    "an offset beyond the end": (_file(tensors=[_tensor("a", offset=64)], data=bytes(32)), "truncated"),
    "an offset between": (_file(tensors=[_tensor("a", offset=4)], data=bytes(64)), "a multiple of 32"),
    "an overlap": (
        _file(tensors=[_tensor("a", [16]), _tensor("b", offset=32)], data=bytes(64)),
        "overlap: 'a' and 'b'",
    ),
    "half a block": (_file(tensors=[_tensor("a", [48], kind=8)], data=bytes(64)), "rows of 48 values"),
    "cut": (_file(tensors=[_tensor("a", [16])], data=bytes(63)), "truncated: its tensors claim 64 bytes"),
    "cut in its padding": (_file(tensors=[_tensor("a", [0])])[:60], "truncated"),
    "another original shape": (
        _file(
            [_key("comfy.gguf.orig_shape.a", ARRAY, struct.pack("<IQII", UINT32, 2, 3, 3))],
            [_tensor("a")],
            bytes(32),
        ),
        "'a' has an original shape",
    ),
    "an original shape of text": (
        _file([_key("comfy.gguf.orig_shape.a", STRING, _text("{"))], [_tensor("a")], bytes(32)),
        "'a' has an original shape",
    ),
    "an original shape without end": (
        _file([_key("comfy.gguf.orig_shape.a", STRING, _text("[Infinity]"))], [_tensor("a")], bytes(32)),
        "'a' has an original shape",
    ),
    "an original shape in brackets": (
        _file([_key("comfy.gguf.orig_shape.a", STRING, _text("[" * 60_000))], [_tensor("a")], bytes(32)),
        "'a' has an original shape",
    ),
    "an original shape of hundred dimensions": (
        _file([_key("comfy.gguf.orig_shape.a", STRING, _text(str([8, *[1] * 99])))], [_tensor("a")], bytes(32)),
        "'a' has an original shape",
    ),
    "an original shape of nothing": (
        _file([_key("comfy.gguf.orig_shape.a", STRING, _text("x"))], [_tensor("a", (1,))], bytes(32)),
        "'a' has an original shape",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    raw, words = FILES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(WeightsInvalid) as caught:
        open_weights(path)
    assert words in caught.value.message
    assert caught.value.message.startswith("model.gguf: ")
    assert caught.value.message.isprintable()


def test_a_header_of_any_length_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "MAX_HEADER_BYTES", 1000)
    (tmp_path / "a").write_bytes(_file([_key("a", STRING, _text("x" * 2000))]))
    with pytest.raises(TensorFileError, match="takes more than"):
        open_gguf(tmp_path / "a")


def _written(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "flux", use_temp_file=False)
    writer.add_string("config", "{}")
    writer.add_uint32("t5encoder.block_count", 24)
    writer.add_float32("epsilon", 1e-6)
    writer.add_bool("yes", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("comfy.gguf.orig_shape.c", [2, 2, 8])
    generator = np.random.default_rng(0)
    writer.add_tensor("a", generator.standard_normal((3, 5)).astype(np.float32))
    codes = gguf.quantize(generator.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    codes = gguf.quantize(generator.standard_normal((1, 32)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_keys_and_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.gguf")
    file = open_weights(path)
    assert isinstance(file, GgufFile)
    assert file.metadata == {
        "general.architecture": "flux", "config": "{}", "t5encoder.block_count": "24", "yes": "true",
        "epsilon": repr(float(np.float32(1e-6))), "comfy.gguf.orig_shape.c": "[2, 2, 8]",
    }  # fmt: skip
    assert file.shapes == {"a": (3, 5), "b": (4, 64), "c": (2, 2, 8)}
    assert (file.tensors["b"].dtype, file.tensors["b"].shape) == ("U8", (4, 68))
    recipes, held = file_recipes([file]), dict(file.read())
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, recipe in recipes.items():
        dense = recipe.make([held[name]])
        values = gguf.dequantize(expected[name].data, expected[name].tensor_type)
        assert dense.shape == file.shapes[name]
        assert torch.equal(dense.flatten(), torch.from_numpy(values.copy()).flatten())


def test_reading_by_pieces_gives_what_mapping_gives(tmp_path: Path) -> None:
    file = open_gguf(_written(tmp_path / "a.gguf"))
    mapped = dict(file.read())
    staged = {name: tensor for name, tensor, _ in read_onto(file, CPU, wanted={"b", "c"})}
    assert staged.keys() == {"b", "c"}
    assert all(torch.equal(staged[name], mapped[name]) for name in staged)


@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_file_that_changed_since_is_refused(change: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "a.gguf")
    file, raw = open_gguf(path), path.read_bytes()
    path.write_bytes(raw[:-32] if change == "cut" else raw.replace(b"epsilon", b"epsilom"))
    with pytest.raises(TensorFileError, match="changed"):
        dict(file.read())
    with pytest.raises(TensorFileError, match="changed"):
        list(read_onto(file, CPU))


def test_what_a_file_is_says_its_content_and_not_its_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((FORMATS / "bf16.gguf").read_bytes())
    (tmp_path / "model.gguf").write_bytes((FORMATS / "native_bf16.safetensors").read_bytes())
    assert isinstance(open_weights(tmp_path / "model.safetensors"), GgufFile)
    assert not isinstance(open_weights(tmp_path / "model.gguf"), GgufFile)
