"""Reading by pieces gives what mapping gives, and notices what changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chromarpc_server.pipeline.weights import staging
from chromarpc_server.pipeline.weights.master import tensor_hash
from chromarpc_server.pipeline.weights.safetensors_file import open_safetensors
from chromarpc_server.pipeline.weights.staging import read_onto
from chromarpc_server.pipeline.weights.tensor_file import TensorFileError

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(staging, "PIECE_BYTES", 1000)
    monkeypatch.setattr(staging, "AHEAD_BYTES", 5000)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.bf16": torch.randn(37, 53, generator=generator).to(torch.bfloat16),
        "b.f32": torch.randn(999, generator=generator),
        "c.scalar": torch.tensor(1.5),
        "d.f8": torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn),
        "e.empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_pieces_are_what_mapping_gives_hashes_included(path: Path) -> None:
    file = open_safetensors(path)
    mapped = dict(file.read())
    staged = list(read_onto(file, CPU))
    assert [name for name, _, _ in staged] == list(mapped)
    for name, tensor, digest in staged:
        assert tensor.dtype == mapped[name].dtype
        assert torch.equal(tensor.float(), mapped[name].float())
        assert digest == tensor_hash(name, mapped[name])


def test_a_file_that_changed_since_is_refused(path: Path) -> None:
    file = open_safetensors(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(TensorFileError, match="changed"):
        list(read_onto(file, CPU))
    path.write_bytes(whole[:8] + whole[8:].replace(b"a.bf16", b"z.bf16"))
    with pytest.raises(TensorFileError, match="changed"):
        list(read_onto(file, CPU))


def test_whoever_stops_early_leaves_nothing_running(path: Path) -> None:
    reading = read_onto(open_safetensors(path), CPU)
    next(reading)
    reading.close()
