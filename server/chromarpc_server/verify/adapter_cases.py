"""`adapters`: adapter files with the weights they should give."""

from __future__ import annotations

from pathlib import Path

from chromarpc_server.domain.errors import LoraIncompatible
from chromarpc_server.pipeline.adapters import read_adapter
from chromarpc_server.verify.report import Outcome, Reporter, Result, distance, skipped
from chromarpc_server.verify.vectors import Vectors

REL = 1e-6


def run(folder: Path, base_path: Path, reporter: Reporter) -> None:
    """Every `NAME.safetensors` that has a `NAME.expected.safetensors`, applied to `base_path`'s weights."""
    expected_paths = sorted(folder.glob("*.expected.safetensors"))
    if not expected_paths:
        return
    if not base_path.is_file():
        reporter.add(skipped(folder.name, f"{base_path.parent.name}/{base_path.name} is not there"))
        return
    base = Vectors.read(base_path)
    for path in expected_paths:
        name = path.name.removesuffix(".expected.safetensors")
        reporter.guarded(f"adapters/{name}", lambda path=path, name=name: _case(path, name, base, reporter))  # type: ignore[misc]


def _case(path: Path, name: str, base: Vectors, reporter: Reporter) -> None:
    case = f"adapters/{name}"
    adapter_path = path.with_name(f"{name}.safetensors")
    if not adapter_path.is_file():
        reporter.add(skipped(case, f"{adapter_path.name} is not there"))
        return
    expected = Vectors.read(path)
    strength = float(expected.metadata["strength"])
    targets = {key: tuple(tensor.shape) for key, tensor in base.tensors.items()}
    try:
        adapter = read_adapter(adapter_path, targets)
    except LoraIncompatible as error:
        if "in a format this server knows" not in error.message:
            raise
        reporter.add(skipped(case, "this version does not know the format"))
        return
    surplus = set(adapter.changes) ^ set(expected.tensors)
    if surplus:
        reporter.add(Result(case, Outcome.FAIL, note=f"changes other weights: {sorted(surplus)[:3]}"))
        return
    errors = [
        distance(adapter.apply(key, base.tensors[key], strength), tensor)
        for key, tensor in expected.tensors.items()
    ]
    rel, max_abs = max(error[0] for error in errors), max(error[1] for error in errors)
    outcome = Outcome.PASS if rel <= REL else Outcome.FAIL
    reporter.add(Result(case, outcome, rel, max_abs, f"rel {REL:g}", f"{adapter.format}, {len(errors)} weights"))
