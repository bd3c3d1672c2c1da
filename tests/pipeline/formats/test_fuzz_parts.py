"""The fuzz target of checkpoints' parts, for a moment; `make fuzz` runs it for ten minutes."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.pipeline.formats.layouts import FORMATS
from tools.fuzz_parts import inputs, judge
from tools.fuzzing import MAX_SECONDS, time_limit

pytestmark = pytest.mark.slow


def test_damaged_parts_are_refused_by_name_or_read(tmp_path: Path) -> None:
    shutil.copy(FORMATS / "vae_config.json", tmp_path)
    outcomes: Counter[str] = Counter()
    for index, (part, raw) in enumerate(itertools.islice(inputs(20), 300)):
        path = tmp_path / f"{index}.part"
        path.write_bytes(raw)
        with time_limit(MAX_SECONDS):
            outcomes[judge(path, part)] += 1
        path.unlink()
    assert {"refused", "read"} <= set(outcomes)
