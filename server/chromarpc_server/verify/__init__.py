"""Checks an install against recorded outputs of the reference.

The folder is laid out like tests/goldens, or is one of its folders of bfloat16 vectors, of the trainer's image, or
of formats; subfolders and files may be absent, and whatever is there is read for its sizes, names and counts. A
file that cannot be used is that case's failure, never a traceback.
"""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import torch

from chromarpc_server.domain.errors import ChromaError
from chromarpc_server.pipeline.device import choose_device, describe_device, on_device
from chromarpc_server.pipeline.fused.check import kernels_fallback
from chromarpc_server.verify import (
    adapter_cases,
    bfloat16_cases,
    comfyui_cases,
    float32_cases,
    format_cases,
    preview_cases,
    preview_runs,
    request_cases,
    torchao_cases,
)
from chromarpc_server.verify.preview_layout import PREVIEW, Kind, find_preview_folders
from chromarpc_server.verify.report import Outcome, Reporter, Result, skipped


def verify(directory: Path, *, device: str, as_json: bool, out: TextIO) -> int:
    """Runs every case that is there.

    Args:
        directory: folder with recorded vectors.
        device: `cpu`, `cuda` or `cuda:N`, for the bf16 cases; float32 cases always run on the CPU.
        as_json: print one JSON object instead of lines.
        out: where to print.

    Returns:
        0 if at least one case ran and none failed, else 1.
    """
    reporter = Reporter(out, as_json=as_json)
    try:
        choice = choose_device(device, "bfloat16")
    except ChromaError as error:
        reporter.add(Result("device", Outcome.FAIL, note=error.message))
        return reporter.finish({"torch": torch.__version__})
    with on_device(choice.device):
        _run(directory, choice.device, reporter)
    return reporter.finish({"device": describe_device(choice).name, "torch": torch.__version__})


def _run(directory: Path, device: torch.device, reporter: Reporter) -> None:
    previews = find_preview_folders(directory)
    float32_cases.run(directory / float32_cases.GROUP, reporter)
    for folder in (directory, *sorted(path for path in directory.iterdir() if path.is_dir())):
        if any(folder == preview.folder for preview in previews):
            continue
        group = folder.name or folder.resolve().name  # of `.`
        if group != float32_cases.GROUP and any(
            (folder / name).is_file() for name in ("pipeline.safetensors", "t5.safetensors")
        ):
            bfloat16_cases.run(folder, group, device, reporter)
    for preview in previews:
        if preview.kind is Kind.RUNS:
            preview_runs.run(preview.folder, device, reporter)
        else:
            preview_cases.run(preview, device, reporter)
    formats = format_cases.find_formats_folder(directory)
    if formats is not None:
        format_cases.run(formats, reporter)
    reporter.guarded("device/kernels", lambda: _kernels(device, reporter))
    base = directory / float32_cases.GROUP / "transformer_tiny.safetensors"
    reporter.guarded("adapters", lambda: adapter_cases.run(directory / "adapters", base, reporter))
    requests = directory / "requests" / "reference_requests.json"
    if requests.is_file():
        reporter.guarded("requests", lambda: request_cases.run(requests, reporter))
    others = (PREVIEW, f"{format_cases.GROUP}/")
    if any(
        result.outcome is not Outcome.SKIP and not result.case.startswith(others) for result in reporter.results
    ):
        # Of interest beside the reference's recorded outputs; alone it would verify nothing of them.
        torchao_cases.run(device, reporter)
    comfyui_cases.run(directory, reporter)


def _kernels(device: torch.device, reporter: Reporter) -> None:
    """Says so where a GPU was verified without the kernels that it should have."""
    fallback = kernels_fallback(device)
    if fallback is not None:
        reporter.add(skipped("device/kernels", fallback.message))
