"""Factors of split q, k and v, as they lie beside one fused weight: put together once, kept with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chromarpc_server.pipeline import PROFILES, Adapter, read_adapter
from chromarpc_server.pipeline.adapters.change import LowRank, RowChange, Rows
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.trainer.exact import ExactPreview
from chromarpc_server.pipeline.trainer.fused import FusedPreview
from chromarpc_server.pipeline.trainer.paths import pair_of
from chromarpc_server.pipeline.weights.stored import as_they_are
from chromarpc_server.runtime.adapter_cache import AdapterCache, AdapterFile
from tests.pipeline.trainer.models import CPU, FLOAT32
from tests.tiny_checkpoint import GOLDENS

SPLIT = GOLDENS / "adapters" / "diffusers_peft.safetensors"


@pytest.fixture
def targets(master: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in master.items()}


@pytest.fixture
def split(targets: dict[str, tuple[int, ...]]) -> Adapter:
    return read_adapter(SPLIT, targets)


@pytest.fixture(params=["preview", "preview-exact"])
def build(
    request: pytest.FixtureRequest, master: dict[str, Tensor], config: ChromaConfig
) -> Callable[[], FusedPreview | ExactPreview]:
    def made() -> FusedPreview | ExactPreview:
        profile = PROFILES[request.param]
        if profile.fused:
            return FusedPreview(config, as_they_are(master), profile, FLOAT32, DevicePlacement(CPU, torch.float32))
        return ExactPreview(config, as_they_are(master), profile, FLOAT32, device=CPU)

    return made


class _Counted(TorchFunctionMode):
    """Counts what puts tensors together."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.joined += func in (torch.cat, torch.concat, torch.stack)
        return func(*args, **(kwargs or {}))


def _joined(model: FusedPreview | ExactPreview, adapters: list[tuple[Adapter, float]]) -> int:
    """How often a switch puts tensors together, apart from its look at what is finite."""
    with _Counted() as counted:
        model.switch(adapters)
    return counted.joined


def test_they_are_put_together_at_the_first_switch_only(
    build: Callable[[], FusedPreview | ExactPreview], split: Adapter
) -> None:
    fused = sum(isinstance(change, Rows) for change in split.changes.values())
    assert fused > 0
    model = build()
    model.switch([])
    assert _joined(model, [(split, 0.8)]) == fused
    model.switch([])
    assert _joined(model, [(split, 0.8)]) == 0, "the same adapter again"
    assert _joined(model, [(split, -0.5)]) == 0, "another multiplier"
    other = build()
    other.switch([])
    assert _joined(other, [(split, 0.8)]) == 0, "another transformer"


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_together_they_are_the_change_of_each_of_their_rows(alpha: float | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    parts = tuple(
        RowChange(start, start + 4, LowRank(drawn(rank, 8), drawn(4, rank), alpha))
        for start, rank in ((0, 2), (8, 3))
    )
    rows = Rows((12, 8), parts)
    pair = pair_of(rows)
    assert pair is not None
    expected = torch.zeros(12, 8)
    for part in parts:
        assert isinstance(part.change, LowRank)
        expected[part.start : part.stop] = part.change.difference(CPU)
    assert torch.allclose(pair.up.float() @ pair.down.float(), expected, atol=1e-5)
    plain = alpha is None and dtype is not torch.float64
    assert pair.up.dtype == pair.down.dtype == (dtype if plain else torch.float32)


def test_a_part_of_another_kind_leaves_the_change_without_a_pair(split: Adapter) -> None:
    rows = next(change for change in split.changes.values() if isinstance(change, Rows))
    other = Rows(rows.whole, (RowChange(0, rows.whole[0], _Other()),))  # type: ignore[arg-type]
    assert pair_of(rows) is not None
    assert pair_of(other) is None


class _Other:
    rank = None


def test_what_is_kept_counts_against_the_budget_of_parsed_adapters(
    targets: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    budget = 10**9
    cache, file = AdapterCache(budget), AdapterFile.of(SPLIT, "path")
    adapter = cache.read(file, "1", targets, check=lambda: None)
    before = cache.size_bytes
    assert before == file.size_bytes
    kept = [pair_of(change) for change in adapter.changes.values() if isinstance(change, Rows)]
    derived = sum(pair.down.nbytes + pair.up.nbytes for pair in kept if pair is not None)
    assert cache.size_bytes == before + derived > before
    small = AdapterCache(before + derived - 1)
    assert small.read(file, "1", targets, check=lambda: None).held_bytes == before
    for change in small.read(file, "1", targets, check=lambda: None).changes.values():
        pair_of(change)
    small.trim()
    assert small.size_bytes == 0, "it became larger than the budget"
