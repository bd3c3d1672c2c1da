"""Streamed blocks on a GPU: real streams, page-locked memory, copies that lag behind or run ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

LAG_CYCLES = 3_000_000
"""About 2 ms of a GPU: longer than a step of such a small model."""


def _slow(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LAG_CYCLES)


@pytest.mark.parametrize("lags", ["neither", "copies", "computing"])
@pytest.mark.parametrize("profile", ["reference", "fp8"])
def test_streamed_blocks_give_the_bits_of_resident_ones(profile: str, lags: str) -> None:
    """Without an adapter, after switches, and from one image to the next."""
    from bench.switching import MINI, random_adapter, random_master
    from chromarpc_server.pipeline import PROFILES, PreparedTransformer
    from chromarpc_server.pipeline.fused.streaming import StreamCopier
    from chromarpc_server.pipeline.placement import DevicePlacement
    from chromarpc_server.pipeline.weights.stored import as_they_are

    device = torch.device("cuda", 0)
    master = random_master(MINI, device)
    adapter = random_adapter(master, 4, 1)
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(256, 64, generator=generator, device=device).bfloat16()
    lengths = ((11, 2), (7,))
    texts = {n: [torch.randn(k, 128, generator=generator, device=device).bfloat16() for k in n] for n in lengths}

    class Lagging(StreamCopier):
        def copy(self, target: Tensor, source: Tensor) -> object:
            _slow(self.stream if lags == "copies" else torch.cuda.current_stream(device))
            return super().copy(target, source)

    def velocities(streamed: int) -> list[Tensor]:
        placement = DevicePlacement(device, torch.bfloat16, hold_float8=True, streamed_blocks=streamed)
        prepared = PreparedTransformer(MINI, as_they_are(master), PROFILES[profile], placement)
        found = []
        with torch.inference_mode():
            for adapters in ([], [(adapter, 1.0)], [(adapter, 0.5)], []):
                prepared.switch(adapters)
                if prepared.blocks is not None and lags != "neither":
                    prepared.blocks.copier = Lagging(device)
                modulations = prepared.model.modulations(torch.tensor([0.7, 0.3], device=device).bfloat16())
                for given in texts.values():
                    conditioning = prepared.run.fused.condition(given, (16, 16))
                    found += [prepared.run(latents, conditioning, modulations[step]) for step in (0, 1)]
            torch.cuda.synchronize()
        assert prepared.run.recorded_count == 0 or not streamed
        return found

    expected = velocities(0)
    assert not torch.equal(expected[0], expected[4])
    for streamed in range(1, MINI.depth + MINI.depth_single_blocks + 1):
        for one, other in zip(velocities(streamed), expected, strict=True):
            assert torch.equal(one, other), streamed


def test_what_was_page_locked_is_unlocked_once_nothing_streams_any_more() -> None:
    from bench.switching import MINI
    from chromarpc_server.pipeline.fused.streaming import BlockStream
    from chromarpc_server.pipeline.models.transformer import ChromaTransformer

    device = torch.device("cuda", 0)
    with torch.device("meta"):
        model = ChromaTransformer(MINI)
    before = torch.cuda.memory_allocated(device)
    for _ in range(20):  # the same addresses come back, and could not be locked twice
        stream = BlockStream(model, 4, device)
        assert stream._host_memory.is_pinned()
        stream.begin()
        del stream
    assert torch.cuda.memory_allocated(device) == before


def test_a_bench_of_copies_measures_what_was_copied() -> None:
    from bench.timed_copier import TimedCopier

    device = torch.device("cuda", 0)
    copier = TimedCopier(device)
    source = torch.ones(2**26, dtype=torch.uint8).pin_memory()
    target = torch.zeros_like(source, device=device)
    copier.wait(copier.copy(target, source))
    found = copier.taken()
    assert (found.size_bytes, bool((target == 1).all())) == (2**26, True)
    assert found.seconds > 0
    assert 0 < found.waited_s <= 1.5 * found.seconds
    assert copier.taken().size_bytes == 0
