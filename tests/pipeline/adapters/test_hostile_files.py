"""Files that nobody vouches for: each is refused by name, quickly, and without allocating what it claims."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from chromarpc_server.domain.errors import LoraError, LoraInvalid
from chromarpc_server.pipeline.adapters import read_adapter
from chromarpc_server.pipeline.weights.safetensors_file import SafetensorsError, open_safetensors
from tests.pipeline.adapters.conftest import Shapes, values

PAIR = {
    "diffusion_model.img_in.lora_A.weight": values(2, 64),
    "diffusion_model.img_in.lora_B.weight": values(64, 2),
}
GOOD = save(PAIR)


def _file(header: object, data: bytes = b"", size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


def _entry(begin: object, end: object, shape: object = (1,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FILES = {
    "zero bytes": b"",
    "seven bytes": b"1234567",
    "HTML": b"<!doctype html><html>not found</html>",
    "terabytes of header": _file(b"{}", size=2**42),
    "the largest number": _file(b"{}", size=2**64 - 1),
    "a header beyond the file": _file(b"{}", size=3),
    "no JSON": _file(b"{" * 100),
    "deep JSON": _file(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "many containers": _file(b'{"a":[' + b"[]," * 500_000 + b"[]]}"),
    "a huge number": _file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 10_000 + b"]}}"),
    "UTF-16": _file('{"a": 1}'.encode("utf-16")),
    "not UTF-8": _file(b'{"\xff": 1}'),
    "a list": _file([]),
    "a number": _file(1),
    "the same name twice": _file(b'{"a":%s,"a":%s}' % ((json.dumps(_entry(0, 4)).encode(),) * 2), bytes(4)),
    "the same option twice": _file(
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)
    ),
    "a lone surrogate": _file(b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a lone surrogate in metadata": _file(b'{"__metadata__": {"a": "\\ud800"}}'),
    "metadata of numbers": _file({"__metadata__": {"a": 1}}),
    "metadata null": _file({"__metadata__": None}),
    "an overlap": _file({"a": _entry(0, 4), "b": _entry(2, 6)}, bytes(6)),
    "the same bytes twice": _file({"a": _entry(0, 4), "b": _entry(0, 4)}, bytes(4)),
    "a gap": _file({"a": _entry(0, 4), "b": _entry(8, 12)}, bytes(12)),
    "bytes at its end": _file({"a": _entry(0, 4)}, bytes(8)),
    "truncated": _file({"a": _entry(0, 8, (2,))}, bytes(4)),
    "backwards": _file({"a": _entry(4, 0)}, bytes(4)),
    "negative": _file({"a": _entry(-4, 0)}, bytes(4)),
    "fractions": _file({"a": _entry(0.0, 4.0)}, bytes(4)),
    "truths": _file({"a": _entry(False, 4)}, bytes(4)),
    "no offsets": _file({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "three offsets": _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4)),
    "another shape": _file({"a": _entry(0, 4, (2,))}, bytes(4)),
    "exabytes": _file({"a": _entry(0, 2**62, (2**60,))}, bytes(4)),
    "a product that overflows": _file({"a": _entry(0, 4, (2**32, 2**32, 2**32))}, bytes(4)),
    "hundred dimensions": _file({"a": _entry(0, 4, [1] * 100)}, bytes(4)),
    "an unknown dtype": _file({"a": _entry(0, 4, (1,), "F32X")}, bytes(4)),
    "a dtype that is none": _file({"a": _entry(0, 4, (1,), ["F32"])}, bytes(4)),
    "an entry that is text": _file({"a": "F32"}),
    "a cut adapter": GOOD[:-1],
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path, targets: Shapes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(FILES[name])
    with pytest.raises(LoraInvalid) as caught:
        read_adapter(path, targets)
    assert str(tmp_path) not in caught.value.message
    assert caught.value.message.isprintable()
    with pytest.raises(SafetensorsError):
        open_safetensors(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("the same name twice", "same name twice: 'a'"),
        ("the same option twice", "same name twice: 'dtype'"),
        ("an overlap", "overlap: 'a' and 'b'"),
        ("the same bytes twice", "overlap: 'a' and 'b'"),
        ("a gap", "a gap of 4 bytes before 'b'"),
        ("truncated", "the last of them is 'a'"),
        ("an unknown dtype", "'a' is of a dtype that is not known: 'F32X'"),
        ("a dtype that is none", "'a' is of a dtype"),
        ("backwards", "'a' has a shape"),
        ("no offsets", "'a' has offsets"),
        ("hundred dimensions", "'a' has a shape"),
        ("a lone surrogate", r"'\ud800'"),
        ("an entry that is text", "no tensor under 'a'"),
        ("a pickle", "it looks like a pickle"),
        ("HTML", "it looks like a web page"),
    ],
)
def test_the_refusal_names_the_key_and_what_is_wrong(name: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(FILES[name])
    with pytest.raises(SafetensorsError) as caught:
        open_safetensors(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_of_pytorchs_is_told_as_what_it_is(legacy: bool, tmp_path: Path) -> None:
    torch.save(PAIR, tmp_path / "a.safetensors", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SafetensorsError, match="looks like a pickle" if legacy else "looks like a zip archive"):
        open_safetensors(tmp_path / "a.safetensors")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, targets: Shapes) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("data.pkl", b"x")
    for name in ("fifo", "loop", "zip", "missing", "."):
        with pytest.raises(LoraInvalid) as caught:
            read_adapter(tmp_path / name, targets)
        assert str(tmp_path) not in caught.value.message
    with pytest.raises(LoraInvalid, match="not a regular file"):
        read_adapter(Path("/dev/zero"), targets)


def test_a_large_header_is_refused_before_it_is_read(tmp_path: Path, targets: Shapes) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**41)
    with pytest.raises(LoraInvalid, match="claims"):
        read_adapter(path, targets)


def test_a_file_of_terabytes_is_refused_by_its_size(tmp_path: Path, targets: Shapes) -> None:
    path = tmp_path / "a.safetensors"
    key = "diffusion_model.img_in.diff"
    raw = json.dumps({key: _entry(0, 2**42, (2**40,))}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + 2**42)
    with pytest.raises(LoraInvalid, match="more than"):
        read_adapter(path, targets)


def test_factors_whose_product_would_be_terabytes_are_never_multiplied(tmp_path: Path, targets: Shapes) -> None:
    stem = "diffusion_model.img_in"
    for tensors in (
        {f"{stem}.lora_A.weight": torch.zeros(1, 2**22), f"{stem}.lora_B.weight": torch.zeros(2**22, 1)},
        {f"{stem}.lokr_w1": torch.zeros(2**11, 2**11), f"{stem}.lokr_w2": torch.zeros(2**11, 2**11)},
    ):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(LoraError, match="shapes do not fit"):
            read_adapter(tmp_path / "a.safetensors", targets)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 100),
        lambda path: os.truncate(path, len(GOOD) - 1),
        lambda path: path.write_bytes(GOOD + b"x"),
        lambda path: path.write_bytes(save({"other": values(500)})),
        lambda path: path.unlink(),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_refused(change: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    file = open_safetensors(path)
    change(path)
    with pytest.raises(SafetensorsError):
        file.load(set(PAIR))


def test_values_written_anew_below_the_same_header_while_they_are_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    os.utime(path, ns=(1, 1))
    file = open_safetensors(path)
    pieces = iter(range(2))

    def rewrite() -> None:
        if next(pieces) == 1:  # after the first tensor was read
            path.write_bytes(GOOD[:-4] + bytes(4))

    with pytest.raises(SafetensorsError, match="changed while it was read"):
        file.load(set(PAIR), rewrite)


def test_a_file_that_is_only_used_meanwhile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    tensors, _ = open_safetensors(path).load(set(PAIR), lambda: os.utime(path, ns=(1, path.stat().st_mtime_ns)))
    assert set(tensors) == set(PAIR)


def test_what_was_read_no_longer_depends_on_the_file(tmp_path: Path, targets: Shapes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    adapter = read_adapter(path, targets)
    os.truncate(path, 0)
    weight = torch.zeros(64, 64)
    expected = PAIR["diffusion_model.img_in.lora_B.weight"] @ PAIR["diffusion_model.img_in.lora_A.weight"]
    assert torch.equal(adapter.apply("img_in.weight", weight, 1.0), expected)


def test_reading_stops_when_it_is_told_to(tmp_path: Path, targets: Shapes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)

    class Stop(Exception):
        pass

    def check() -> None:
        raise Stop

    with pytest.raises(Stop):
        read_adapter(path, targets, check=check)


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_refused_by_name_or_harmless(data: st.DataObject, tmp_path: Path, targets: Shapes) -> None:
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, 400))
        raw[where] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(raw[:cut]))
    try:
        adapter = read_adapter(path, targets)
    except LoraError as error:
        assert error.message.isprintable()
    else:
        assert adapter.targets


PARTS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "alpha", "dora_scale", "lokr_w1", "lokr_w2_a")
PARTS += ("lokr_w2_b", "hada_w1_a", "diff", "diff_b", "magnitude", "lora_B.bias", "oft_blocks")
STEMS = ("diffusion_model.img_in.", "transformer.transformer_blocks.0.attn.to_q.", "lora_unet_txt_in.", "x.", "")
NAMES = st.tuples(st.sampled_from(STEMS), st.sampled_from(PARTS)).map("".join)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 8, 48, 64]), max_size=3)


@pytest.mark.slow
@given(
    shapes=st.dictionaries(NAMES, SHAPES, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool]),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mixture_of_keys_and_shapes_is_refused_by_name_or_applies(
    shapes: dict[str, list[int]], dtype: torch.dtype, tmp_path: Path, targets: Shapes
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({key: torch.ones(shape).to(dtype) for key, shape in shapes.items()}, path)
    try:
        adapter = read_adapter(path, targets)
    except LoraError as error:
        assert error.message.isprintable()
        return
    for name in adapter.targets:
        weight = torch.ones(targets[name], dtype=torch.bfloat16)
        assert adapter.apply(name, weight, 0.5).shape == weight.shape
    assert set(adapter.matched) | set(adapter.unmatched) == set(shapes)
