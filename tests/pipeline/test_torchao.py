"""The float8 that is written out here is the installed torchao's, as closely as its version allows."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chromarpc_server.pipeline.libraries import libraries
from chromarpc_server.pipeline.weights.quantization import FLOAT8, FLOAT8_MAX, quantize_rows
from chromarpc_server.pipeline.weights.torchao_rows import TorchaoRows, quantize_with_torchao
from chromarpc_server.verify import torchao_cases, verify
from chromarpc_server.verify.report import Reporter, Result
from chromarpc_server.verify.torchao_cases import LARGEST_SHARE, judge, steps

CPU = torch.device("cpu")
ROWS = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).bfloat16()


def _results() -> list[Result]:
    reporter = Reporter(io.StringIO(), as_json=True)
    torchao_cases.run(CPU, reporter)
    return reporter.results


@pytest.mark.slow
def test_the_installed_torchao_gives_the_same_rows_but_for_a_small_share_that_is_told() -> None:
    results = _results()
    assert {result.outcome.value for result in results} == {"PASS"}, results
    assert {result.case for result in results} == {
        "torchao/float8 random rows cpu",
        "torchao/float8 edge rows cpu",
    }
    theirs = quantize_with_torchao(ROWS)
    q, _ = quantize_rows(ROWS)
    apart = (steps(q) - steps(theirs.q)).abs()
    if theirs.version.startswith("0.10."):
        assert int(apart.max()) == 0
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) <= LARGEST_SHARE
    assert all(theirs.version in result.note and "%" in result.note for result in results)


def _later(weight: Tensor) -> TorchaoRows:
    """As torchao computes from 0.13 on."""
    scale = weight.abs().amax(dim=1).float() / FLOAT8_MAX
    q = (weight.float() / scale[:, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return TorchaoRows("0.99", q, scale)


def _moved(q: Tensor, share: float, by: int) -> Tensor:
    """`q` with a share of its positive numbers so many steps nearer to zero."""
    bits = q.view(torch.uint8).clone()
    chosen = (bits > 8) & (bits < 126) & (torch.rand(q.shape, generator=torch.Generator().manual_seed(1)) < share)
    bits[chosen] -= by
    return bits.view(FLOAT8)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (TorchaoRows("0.10.0", *quantize_rows(ROWS)), "PASS"),
        (TorchaoRows("0.10.0", _moved(quantize_rows(ROWS)[0], 0.001, 1), quantize_rows(ROWS)[1]), "FAIL"),
        (TorchaoRows("0.10.0", quantize_rows(ROWS)[0], quantize_rows(ROWS)[1] * 2), "FAIL"),
        (_later(ROWS), "PASS"),
        (TorchaoRows("0.99", _moved(_later(ROWS).q, 0.001, 2), _later(ROWS).scale), "FAIL"),
        (TorchaoRows("0.99", _moved(_later(ROWS).q, 0.2, 1), _later(ROWS).scale), "FAIL"),
    ],
    ids=["equal", "one value", "a scale", "later", "two steps", "too many"],
)
def test_what_passes(theirs: TorchaoRows, expected: str) -> None:
    assert judge("case", "torchao", ROWS, theirs, *quantize_rows(ROWS)).outcome.value == expected


def test_steps_are_counted_through_zero() -> None:
    numbers = torch.tensor([-448.0, -(2.0**-9), -0.0, 0.0, 2.0**-9, 2.0**-8]).to(FLOAT8)
    assert steps(numbers).tolist() == [-126, -1, 0, 0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "said"),
    [("torchao", "torchao is not installed"), ("torchao.quantization", "torchao cannot be imported here")],
)
def test_without_a_torchao_that_works_the_check_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, goldens: Path, tmp_path: Path, hidden: str, said: str
) -> None:
    libraries()  # diffusers wants a torchao of its own, and is imported before it is hidden
    for name in [name for name in sys.modules if name == "torchao" or name.startswith("torchao.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    (tmp_path / "cpu_fp32").mkdir()
    (tmp_path / "cpu_fp32" / "schedule.json").write_bytes((goldens / "cpu_fp32" / "schedule.json").read_bytes())
    out = io.StringIO()
    assert verify(tmp_path, device="cpu", as_json=True, out=out) == 0
    cases = [case for case in json.loads(out.getvalue())["cases"] if case["case"].startswith("torchao/")]
    assert [case["outcome"] for case in cases] == ["SKIP"]
    assert said in cases[0]["note"]


@pytest.mark.slow
def test_torchao_says_nothing_and_leaves_logging_as_it_was() -> None:
    code = (
        "import logging, torch\n"
        "from chromarpc_server.pipeline.weights.torchao_rows import quantize_with_torchao\n"
        "quantize_with_torchao(torch.ones(16, 16).bfloat16())\n"
        "assert not logging.getLogger().handlers and logging.root.manager.disable == 0\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
