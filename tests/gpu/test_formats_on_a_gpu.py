"""Every format that weights are stored in, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_checkpoint import GOLDENS

pytestmark = pytest.mark.gpu

FORMATS = sorted(
    [
        *(GOLDENS / "formats").glob("*.safetensors"),
        *(GOLDENS / "formats").glob("*.gguf"),
        *(GOLDENS / "formats_hashed").glob("*.gguf"),
        *(GOLDENS / "formats_hashed").glob("*.safetensors"),
    ]
)


@pytest.mark.parametrize("path", FORMATS, ids=lambda path: path.name)
def test_codes_of_every_format_stand_for_the_same_values_on_a_gpu(path: Path) -> None:
    from chromarpc_server.pipeline import LoadContext, WeightFiles
    from chromarpc_server.pipeline.memory import pin
    from chromarpc_server.pipeline.merged_transformer import on_device
    from chromarpc_server.pipeline.weights.formats.codes import file_recipes
    from chromarpc_server.pipeline.weights.loading import ReadingProgress
    from chromarpc_server.pipeline.weights.part import StoredPart
    from chromarpc_server.pipeline.weights.stored import StoredWeights

    device = torch.device("cuda", 0)
    file = WeightFiles().open(path)
    part = StoredPart((file,), file_recipes([file.header]))
    reading = ReadingProgress((part,), LoadContext())
    expected, staged = reading.stored(part), reading.stored(part, device)
    pinned = StoredWeights(part.recipes, pin(expected.pieces, device))
    for weights in (staged, pinned):
        for name, found in on_device(weights, list(weights), device):
            assert found.is_cuda
            dense = expected[name].dense()
            if "convrot" in weights[name].recipe.stored_as:
                torch.testing.assert_close(found.cpu(), dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))
            else:
                assert torch.equal(found.cpu().nan_to_num(), dense.nan_to_num())
