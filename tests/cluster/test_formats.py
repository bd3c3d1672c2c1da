"""A host of a cluster loads what the server would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from chromarpc_server.domain.events import Prepared
from chromarpc_server.runtime.work import EncodedImage, Report
from tests.cluster.stand import plan, stand, work
from tests.pipeline.formats import writers

pytestmark = pytest.mark.slow

NAME = "chroma-mini.safetensors"


async def test_a_host_draws_from_gguf_and_says_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns(NAME))
    with safe_open(tiny_checkpoint / NAME, "pt") as file:
        writers.as_gguf(load_file(tiny_checkpoint / NAME), file.metadata()["config"], folder / NAME)
    async with stand(folder, tmp_path) as set_up:
        device = await set_up.device()
        await device.open()
        reports: list[Report] = []
        await device.run(work(folder, plan(preview=None)), reports.append)
        assert next(report for report in reports if isinstance(report, Prepared)).stored_as == "GGUF Q8_0"
        assert any(isinstance(report, EncodedImage) for report in reports)
        device.close()
