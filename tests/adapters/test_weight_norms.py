"""Norms of a model's parameters: right, and each read once for each version of the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chromarpc_server.adapters.weight_norms import WeightNorms
from chromarpc_server.domain.errors import JobCancelled, WeightsInvalid
from chromarpc_server.pipeline import WeightFiles
from chromarpc_server.pipeline.weights.part import StoredPart, open_part

WEIGHTS = {"a": torch.full((4, 9), 2.0, dtype=torch.bfloat16), "b": torch.zeros(3), "c": torch.ones(5)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def _part(path: Path) -> StoredPart:
    return open_part(path, "transformer", WeightFiles())


def test_each_parameter_is_read_once(path: Path) -> None:
    norms, file, checks = WeightNorms(), _part(path), []

    def check() -> None:
        checks.append(1)

    assert norms.squared(file, ["a", "b"], check=check) == pytest.approx({"a": 144.0, "b": 0.0})
    assert norms.squared(file, ["c", "a"], check=check) == pytest.approx({"c": 5.0, "a": 144.0})
    assert len(checks) == 3


def test_another_version_of_the_file_is_read_anew(path: Path) -> None:
    norms = WeightNorms()
    norms.squared(_part(path), ["c"])
    save_file({"c": torch.full((5,), 3.0)}, path)
    os.utime(path, ns=(0, 0))
    assert norms.squared(_part(path), ["c"]) == pytest.approx({"c": 45.0})


def test_what_was_computed_before_a_stop_is_kept(path: Path) -> None:
    norms, file = WeightNorms(), _part(path)
    left = iter([None])

    def check() -> None:
        if next(left, 1) is not None:
            raise JobCancelled("the caller went away")

    with pytest.raises(JobCancelled):
        norms.squared(file, ["a", "c"], check=check)
    counted: list[int] = []
    norms.squared(file, ["a", "c"], check=lambda: counted.append(1))
    assert len(counted) == 1


def test_a_file_that_went_away_is_told_without_its_folder(path: Path) -> None:
    file = _part(path)
    path.unlink()
    with pytest.raises(WeightsInvalid) as caught:
        WeightNorms().squared(file, ["a"])
    assert str(path.parent) not in caught.value.message
