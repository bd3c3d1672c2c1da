"""What only a CUDA device can show. Run by hand: `make test-gpu`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from chromarpc_server.verify import verify

pytestmark = pytest.mark.gpu


def test_verify_passes_and_exact_is_bit_identical_where_it_was_recorded(goldens: Path) -> None:
    out = io.StringIO()
    code = verify(goldens, device="cuda", as_json=True, out=out)
    report = json.loads(out.getvalue())
    assert code == 0, [case for case in report["cases"] if case["outcome"] == "FAIL"]
    exact = [case for case in report["cases"] if case["case"].endswith(" exact") and "pipeline/" in case["case"]]
    assert exact
    if torch.cuda.get_device_name() == "NVIDIA H100 80GB HBM3" and torch.__version__ == "2.11.0+cu130":
        recorded = [case for case in exact if case["case"].startswith("h100_bf16_float8")]
        assert all(case["tolerance"] == "exact" for case in recorded)
