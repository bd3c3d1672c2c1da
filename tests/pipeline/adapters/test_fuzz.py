"""The fuzz target, for a moment; `make fuzz` runs it for ten minutes."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
from torch import Tensor

from tools.fuzz_adapters import inputs, judge
from tools.fuzzing import MAX_SECONDS, time_limit

pytestmark = pytest.mark.slow


def test_damaged_files_are_refused_by_name_or_apply(base: dict[str, Tensor], tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    path = tmp_path / "a.safetensors"
    for raw in itertools.islice(inputs(20), 600):
        path.write_bytes(raw)
        with time_limit(MAX_SECONDS):
            outcomes[judge(path, base)] += 1
    assert {"LORA_INVALID", "applied"} <= set(outcomes)
