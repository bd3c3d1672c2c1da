"""Parsed adapters in host memory: by what a file was when its job was admitted, within a budget."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.errors import LoraChanged
from chromarpc_server.pipeline import Adapter
from chromarpc_server.runtime.adapter_cache import AdapterCache
from tests.tiny_checkpoint import GOLDENS

TARGETS = {
    name: tuple(tensor.shape)
    for name, tensor in load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors").items()
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return _copy("aitk", tmp_path / "a.safetensors")


def _copy(name: str, path: Path) -> Path:
    shutil.copyfile(GOLDENS / "adapters" / f"{name}.safetensors", path)
    return path


def _read(
    cache: AdapterCache, file: AdapterFile, revision: str = "1", check: Callable[[], None] = lambda: None
) -> Adapter:
    return cache.read(file, revision, TARGETS, check=check)


def test_a_file_is_parsed_once_for_each_checkpoint(file: Path) -> None:
    cache, known = AdapterCache(10**9), AdapterFile.of(file, "path")
    assert _read(cache, known) is _read(cache, known)
    assert _read(cache, known) is not _read(cache, known, revision="2")


def test_what_was_used_longest_ago_leaves_first(file: Path, tmp_path: Path) -> None:
    one = AdapterFile.of(file, "path")
    two = AdapterFile.of(_copy("kohya", tmp_path / "b.safetensors"), "path")
    cache = AdapterCache(one.size_bytes + two.size_bytes - 1)
    first = _read(cache, one)
    _read(cache, two)
    assert cache.size_bytes == two.size_bytes
    assert _read(cache, one) is not first


@pytest.mark.parametrize("name", ["aitk", "kohya"])
def test_a_file_written_anew_since_the_job_was_admitted_is_not_taken_for_it(name: str, file: Path) -> None:
    cache, admitted = AdapterCache(10**9), AdapterFile.of(file, "path")
    os.utime(_copy(name, file), ns=(0, 0))
    with pytest.raises(LoraChanged, match="anew"):
        _read(cache, admitted)
    assert cache.size_bytes == 0
    assert _read(cache, AdapterFile.of(file, "path")).size_bytes == file.stat().st_size


def test_a_file_that_is_replaced_while_it_is_read_is_not_kept_under_its_old_name(
    file: Path, tmp_path: Path
) -> None:
    cache, admitted = AdapterCache(10**9), AdapterFile.of(file, "path")
    other = _copy("aitk", tmp_path / "other")

    def replace() -> None:
        if other.exists():
            other.replace(file)

    with pytest.raises(LoraChanged, match="anew"):
        _read(cache, admitted, check=replace)
    assert cache.size_bytes == 0


def test_a_file_that_went_away_is_told(file: Path) -> None:
    admitted = AdapterFile.of(file, "path")
    file.unlink()
    with pytest.raises(LoraChanged, match="went away"):
        _read(AdapterCache(10**9), admitted)
