"""`torchao`: the same rows, quantized by the torchao that is installed and by `pipeline.quantization`.

The reference's float8 is torchao 0.10's, which is written out in `pipeline.quantization`, so that any torchao, or
none, gives the same weights. Versions that keep scales in the weight's dtype (0.10, 0.11) have to agree bit for
bit. Later ones keep them in float32 and divide instead of multiplying by a rounded reciprocal: a few values are
rounded to the e4m3 number beside.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from chromarpc_server.pipeline.fused import plain
from chromarpc_server.pipeline.fused.check import fused_ops
from chromarpc_server.pipeline.weights.quantization import (
    FLOAT8,
    FLOAT8_MAX,
    SMALLEST_SCALE,
    dequantize_rows,
    quantize_rows,
)
from chromarpc_server.pipeline.weights.torchao_rows import (
    TorchaoRows,
    quantize_with_torchao,
    torchao_version,
)
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, skipped

LARGEST_SHARE = 0.04
"""Of values one e4m3 step apart. Of the random rows below, 2.5 % are with torchao 0.13 to 0.18 on a CPU."""
ROWS, COLUMNS = 256, 3072


def run(device: torch.device, reporter: Reporter) -> None:
    """Every kind of rows, on a CPU and, where another device is verified, on that."""
    try:
        name = f"torchao {torchao_version()}"
    except ModuleNotFoundError as error:
        missing = error.name == "torchao"
        reason = "torchao is not installed" if missing else f"torchao cannot be imported here: no {error.name}"
        reporter.add(skipped("torchao/float8", reason))
        return
    except Exception as error:  # noqa: BLE001 - whatever a torchao for another torch does when it is imported
        reporter.add(skipped("torchao/float8", f"torchao cannot be imported here: {type(error).__name__}"))
        return
    for place in {"cpu": torch.device("cpu"), device.type: device}.values():
        for kind, rows in (("random rows", _random_rows()), ("edge rows", _edge_rows())):
            case, placed = f"torchao/float8 {kind} {place.type}", rows.to(place)
            reporter.guarded(case, partial(_compare, case, name, placed, reporter))


def _random_rows() -> Tensor:
    """As weights are, and with far outliers, which use the small numbers of e4m3 too."""
    drawn = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(18))
    drawn[ROWS // 2 :] = drawn[ROWS // 2 :] ** 5
    return (0.02 * drawn).bfloat16()


def _edge_rows() -> Tensor:
    """Zeros, a single value, the largest and smallest numbers, all between, and scales at their floor."""
    floor = FLOAT8_MAX * SMALLEST_SCALE
    rows = torch.zeros(9, 256)
    rows[1, 0] = FLOAT8_MAX
    rows[2] = 3e38
    rows[3] = 2.0**-133
    rows[4] = torch.linspace(-FLOAT8_MAX, FLOAT8_MAX, 256)
    rows[5] = torch.linspace(-1e-3, 1e-3, 256)
    rows[6] = torch.linspace(-floor, floor, 256)
    rows[7] = torch.linspace(-floor / 8, floor / 8, 256)
    rows[8] = 1.0
    rows[8, 0] = -0.0
    return rows.bfloat16()


def _compare(case: str, name: str, rows: Tensor, reporter: Reporter) -> None:
    try:
        theirs = quantize_with_torchao(rows)
    except NotImplementedError as error:
        reporter.add(skipped(case, str(error)))
        return
    reporter.add(judge(case, name, rows, theirs, *quantize_rows(rows)))
    ops = fused_ops(rows.device)
    if ops is not plain:
        q = torch.empty(rows.shape, dtype=FLOAT8, device=rows.device)
        scale = torch.empty(rows.shape[0], dtype=rows.dtype, device=rows.device)
        ops.quantize_weight(rows, q, scale)
        reporter.add(judge(f"{case} kernel", name, rows, theirs, q, scale))


def judge(case: str, name: str, rows: Tensor, theirs: TorchaoRows, q: Tensor, scale: Tensor) -> Result:
    """Passes where the two agree as closely as that torchao can."""
    is_exact = theirs.scale.dtype == rows.dtype
    # Later versions have no smallest scale: a row of zeros becomes NaN there, and tiny values grow.
    kept = slice(None) if is_exact else rows.abs().amax(dim=1) >= FLOAT8_MAX * SMALLEST_SCALE
    apart = (steps(q[kept]) - steps(theirs.q[kept])).abs()
    share, furthest = float((apart > 0).float().mean()), int(apart.max())
    expected = dequantize_rows(theirs.q[kept], theirs.scale[kept])
    rel, max_abs = distance(dequantize_rows(q[kept], scale[kept]), expected.to(rows.dtype))
    if is_exact:
        outcome = share == 0 and bool((scale == theirs.scale).all())
        tolerance, note = "exact", f"{name}: {share:.2%} of the values differ"
    else:
        outcome = share <= LARGEST_SHARE and furthest <= 1
        tolerance = f"{LARGEST_SHARE:.0%} of the values one e4m3 step apart"
        note = f"{name} keeps scales in float32: {share:.2%} of the values differ, by {furthest} step at most"
        left_out = len(rows) - len(apart)
        note += f"; {left_out} rows left out that it gives no smallest scale" if left_out else ""
    return Result(case, Outcome.PASS if outcome else Outcome.FAIL, rel, max_abs, tolerance, note)


def steps(q: Tensor) -> Tensor:
    """Float8 numbers by their place among all float8 numbers; both zeros are 0."""
    bits = q.contiguous().view(torch.uint8).int()
    return torch.where(bits < 128, bits, 128 - bits)
