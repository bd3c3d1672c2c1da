"""Whether a job's weights are there already, as the queue asks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.runtime.model_cache import CacheSnapshot, ResidentSet, SetKey

ROUNDED = SetKey("chroma", "reference", ())
UNROUNDED = replace(ROUNDED, rounded=False)


def _snapshot(key: SetKey, weights: Literal["dequantized", "float8"] = "dequantized") -> CacheSnapshot:
    memory = {"chroma": MemoryPlan(weights, "device", "device", tile_autoencoder=False, record_graphs=True)}
    return CacheSnapshot(sets=(ResidentSet(key, (), 1),), memory=memory)


def test_rounded_and_unrounded_weights_are_two_sets() -> None:
    assert _snapshot(ROUNDED).holds(ROUNDED)
    assert not _snapshot(ROUNDED).holds(UNROUNDED)
    assert _snapshot(UNROUNDED).holds(UNROUNDED)
    assert not CacheSnapshot().holds(ROUNDED)


@pytest.mark.parametrize(("profile", "weights"), [("reference", "float8"), ("fp8", "dequantized")])
def test_where_weights_are_rounded_whatever_is_asked_for_one_set_serves_both(
    profile: str, weights: Literal["dequantized", "float8"]
) -> None:
    rounded = replace(ROUNDED, profile=profile)
    assert _snapshot(rounded, weights).holds(replace(rounded, rounded=False))
