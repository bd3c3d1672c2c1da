"""Blocks that are streamed compute what resident ones do, bit for bit, and never with another block's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from chromarpc_server.domain.errors import JobCancelled
from chromarpc_server.pipeline import PROFILES, Adapter, LoadContext, PreparedTransformer, read_adapter
from chromarpc_server.pipeline.fused.streaming import BlockStream, PlainCopier
from chromarpc_server.pipeline.models.config import ChromaConfig
from chromarpc_server.pipeline.models.transformer import ChromaTransformer
from chromarpc_server.pipeline.placement import DevicePlacement
from chromarpc_server.pipeline.streamed import BlockSizes, Ring
from chromarpc_server.pipeline.weights.stored import as_they_are
from tests.tiny_checkpoint import GOLDENS

CPU = torch.device("cpu")
GRID = (4, 6)
TINY = GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors"
BLOCKS = 5
"""Of the tiny transformer: 2 double ones, 3 single ones."""
STEPS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For tensors as small as the tiny checkpoint's more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in load_file(TINY).items()}


@pytest.fixture(scope="module")
def config(weights: dict[str, Tensor]) -> ChromaConfig:
    with safe_open(TINY, "pt") as file:
        return ChromaConfig.from_shapes({name: t.shape for name, t in weights.items()}, dict(file.metadata()))


@pytest.fixture(scope="module")
def adapters(weights: dict[str, Tensor]) -> list[Adapter]:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return [read_adapter(GOLDENS / "adapters" / f"{name}.safetensors", shapes) for name in ("aitk", "kohya_dora")]


class _Late(PlainCopier):
    """Copies nothing before it is waited for; then everything that was begun earlier, in its order."""

    def __init__(self, *, waits: bool = True) -> None:
        self._waits = waits
        self._begun: list[Callable[[], object]] = []

    def copy(self, target: Tensor, source: Tensor) -> object:
        self._begun.append(partial(target.copy_, source))
        return len(self._begun)

    def wait(self, copied: object) -> None:
        assert isinstance(copied, int)
        for index in range(copied if self._waits else 0):
            self._begun[index]()
            self._begun[index] = lambda: None


def _prepare(
    config: ChromaConfig, weights: dict[str, Tensor], profile: str, dtype: torch.dtype, streamed: int
) -> PreparedTransformer:
    placement = DevicePlacement(CPU, dtype, hold_float8=True, streamed_blocks=streamed)
    return PreparedTransformer(config, as_they_are(weights), PROFILES[profile], placement)


def _steps(prepared: PreparedTransformer, lengths: tuple[int, ...]) -> list[Tensor]:
    """Velocities of some steps, each from the one before."""
    generator = torch.Generator().manual_seed(3)
    config, dtype = prepared.config, prepared.model.img_in.bias.dtype
    latents = torch.randn(GRID[0] * GRID[1], config.in_channels, generator=generator).to(dtype)
    texts = [torch.randn(length, config.context_in_dim, generator=generator).to(dtype) for length in lengths]
    found = []
    with torch.inference_mode():
        modulations = prepared.model.modulations(torch.linspace(1, 0.3, STEPS).to(dtype))
        conditioning = prepared.run.fused.condition(texts, GRID)
        for index in range(STEPS):
            found.append(prepared.run(latents, conditioning, modulations[index]))
            latents = latents - 0.1 * found[-1][0]
    return found


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("streamed", range(1, BLOCKS + 1))
@pytest.mark.parametrize("lengths", [(11, 2), (7,)], ids=["guidance", "one-pass"])
@pytest.mark.parametrize(
    ("profile", "dtype"), [("reference", torch.float32), ("reference", torch.bfloat16), ("fp8", torch.float32)]
)
def test_streamed_blocks_give_the_bits_of_resident_ones(
    config: ChromaConfig,
    weights: dict[str, Tensor],
    adapters: list[Adapter],
    profile: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    streamed: int,
) -> None:
    """Without adapters and after switches, from one image to the next."""
    resident = _prepare(config, weights, profile, dtype, 0)
    other = _prepare(config, weights, profile, dtype, streamed)
    for chosen in ([], [(adapters[0], 1.0)], [(adapters[0], 0.5), (adapters[1], 1.0)], []):
        assert resident.switch(chosen).rewritten_tensors == other.switch(chosen).rewritten_tensors
        if other.blocks is not None:
            other.blocks.copier = _Late()
        expected = _steps(resident, lengths)
        assert _same(_steps(other, lengths), expected)
        assert _same(_steps(other, lengths), expected)


def test_a_block_that_does_not_wait_for_its_copy_computes_something_else(
    config: ChromaConfig, weights: dict[str, Tensor]
) -> None:
    """So the test above can fail."""
    resident, other = (_prepare(config, weights, "reference", torch.float32, count) for count in (0, 3))
    for prepared in (resident, other):
        prepared.switch([])
    assert other.blocks is not None
    with torch.inference_mode():
        other.blocks._device_memory.zero_()
    other.blocks.copier = _Late(waits=False)
    assert not _same(_steps(other, (7,)), _steps(resident, (7,)))


def test_a_step_that_broke_off_leaves_nothing_that_the_next_one_computes_with(
    config: ChromaConfig, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, whole = (_prepare(config, weights, "reference", torch.float32, count) for count in (4, 0))
    for each in (prepared, whole):
        each.switch([])
    expected = _steps(whole, (7,))
    enter = BlockStream.enter
    for broken in range(BLOCKS):

        def stop(stream: BlockStream, block: int, broken: int = broken) -> None:
            enter(stream, block)
            if block == broken:
                raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(BlockStream, "enter", stop)
            with pytest.raises(MemoryError):
                _steps(prepared, (7,))
        assert _same(_steps(prepared, (7,)), expected)


def test_a_switch_that_was_stopped_is_repaired_by_the_next_one(
    config: ChromaConfig, weights: dict[str, Tensor], adapters: list[Adapter]
) -> None:
    prepared, cold = (_prepare(config, weights, "reference", torch.float32, 4) for _ in range(2))
    prepared.switch([])
    _steps(prepared, (7,))
    calls: Iterator[int] = iter(range(100))

    def check() -> None:
        if next(calls) == 3:
            raise JobCancelled("stopped")

    with pytest.raises(JobCancelled):
        prepared.switch([(adapters[0], 1.0)], LoadContext(check=check))
    prepared.switch([(adapters[0], 1.0)])
    cold.switch([(adapters[0], 1.0)])
    assert prepared.blocks is not None
    assert cold.blocks is not None
    for name in weights:
        if name in prepared.blocks:
            one, other = (each.blocks.stored(name).view(torch.uint8) for each in (prepared, cold))  # type: ignore[union-attr]
            assert torch.equal(one, other), name
    assert _same(_steps(prepared, (7,)), _steps(cold, (7,)))


def test_what_is_streamed_takes_host_memory_instead_of_the_devices(
    config: ChromaConfig, weights: dict[str, Tensor]
) -> None:
    sizes = BlockSizes.of({name: tensor.shape for name, tensor in weights.items()})
    assert (sizes.doubles, sizes.singles, sizes.double) == (2, 3, 2 * sizes.single)
    whole = _prepare(config, weights, "reference", torch.bfloat16, 0)
    whole.switch([])
    for count in range(1, BLOCKS + 1):
        prepared = _prepare(config, weights, "reference", torch.bfloat16, count)
        prepared.switch([])
        assert prepared.blocks is not None
        assert prepared.blocks.host_bytes == sizes.streamed_bytes(count)
        assert whole.size_bytes - prepared.size_bytes == sizes.saved_bytes(count)


class _Streams:
    """A device with a stream that computes and one that copies, whose work is done later, in any order that events
    allow.
    """

    def __init__(self, *, waits: bool, follows: bool) -> None:
        self._waits, self._follows = waits, follows
        self.computing: list[tuple[int, Callable[[], None]]] = []
        """What comes after how many copies."""
        self.copying: list[tuple[int, Callable[[], object]]] = []
        """What comes after how many computations."""
        self._after = 0

    def copy(self, target: Tensor, source: Tensor) -> object:
        self.copying.append((len(self.computing) if self._follows else 0, partial(target.copy_, source)))
        return len(self.copying)

    def wait(self, copied: object) -> None:
        assert isinstance(copied, int)
        if self._waits:
            self._after = max(self._after, copied)

    def finish(self) -> None:
        pass

    def compute(self, work: Callable[[], None]) -> None:
        self.computing.append((self._after, work))

    def run(self, *, copies_first: bool) -> None:
        """Does everything, with copies as early or as late as they may be."""
        computed = copied = 0
        while computed < len(self.computing) or copied < len(self.copying):
            may_copy = copied < len(self.copying) and self.copying[copied][0] <= computed
            may_compute = computed < len(self.computing) and self.computing[computed][0] <= copied
            assert may_copy or may_compute, "both streams wait for each other"
            if may_copy and (copies_first or not may_compute):
                self.copying[copied][1]()
                copied += 1
            else:
                self.computing[computed][1]()
                computed += 1


def _wrong_blocks(config: ChromaConfig, count: int, streams: _Streams, *, copies_first: bool) -> list[int]:
    """Blocks that computed with another one's weights, over some steps of which one is broken off."""
    with torch.device("meta"):
        model = ChromaTransformer(config)
    total = config.depth + config.depth_single_blocks
    stream = BlockStream(model, count, CPU, streams)
    names = {stream._places[name].block: name for name in stream._places}
    for name, place in stream._places.items():
        stream.stored(name).view(torch.uint8).fill_(place.block + 1)
    wrong: list[int] = []

    def look(block: int) -> None:
        if not bool((stream.weight(names[block]).view(torch.uint8) == block + 1).all()):
            wrong.append(block)

    for step in range(4):
        stream.begin()
        for block in range(total):
            stream.enter(block)
            streams.compute(partial(look, block))
            if step == 1 and block == total // 2:
                break
            stream.leave(block)
    streams.run(copies_first=copies_first)
    return wrong


SHAPES = [(2, 3), (4, 8), (3, 0), (0, 4), (5, 3)]


@pytest.mark.parametrize("copies_first", [True, False], ids=["early-copies", "late-copies"])
@pytest.mark.parametrize(("doubles", "singles"), SHAPES)
def test_no_block_meets_another_ones_weights_however_the_streams_run(
    config: ChromaConfig, doubles: int, singles: int, copies_first: bool
) -> None:
    shape = _of(config, doubles, singles)
    for count in range(1, doubles + singles + 1):
        streams = _Streams(waits=True, follows=True)
        assert _wrong_blocks(shape, count, streams, copies_first=copies_first) == [], count


@pytest.mark.parametrize(("waits", "follows", "copies_first"), [(False, True, False), (True, False, True)])
def test_without_either_of_the_waits_one_does(
    config: ChromaConfig, waits: bool, follows: bool, copies_first: bool
) -> None:
    streams = _Streams(waits=waits, follows=follows)
    assert _wrong_blocks(_of(config, 4, 8), 6, streams, copies_first=copies_first)


def _of(config: ChromaConfig, doubles: int, singles: int) -> ChromaConfig:
    return replace(config, hidden_size=16, num_heads=2, depth=doubles, depth_single_blocks=singles)


def test_streamed_blocks_are_spread_over_the_step_and_begin_after_the_first() -> None:
    sizes = BlockSizes(double=2000, single=1000, doubles=19, singles=38)
    for count in range(1, 57):
        chosen = sizes.streamed(count)
        assert len(set(chosen)) == count
        assert chosen == tuple(sorted(chosen))
        assert chosen[0] > 0
        saved = sizes.saved_bytes(count)
        assert saved >= sizes.saved_bytes(count - 1)
        if count <= 47:  # as many bytes in the time of double blocks as of single ones
            in_doubles = sum(2 for block in chosen if block < 19)
            assert abs(in_doubles - (2 * count / 5)) < 2
    assert sizes.streamed(57) == tuple(range(57))
    assert sizes.streamed(0) == ()
    assert sizes.ring_bytes(10) == 4000
    assert sizes.ring_bytes(3) == 2000


def test_a_ring_holds_two_double_blocks_or_four_single_ones() -> None:
    ring = Ring.of([2, 2, 2, 1, 1, 1, 1, 1], 4)
    assert ring.offsets == (0, 2, 0, 2, 3, 0, 1, 2)
    assert ring.first == (0, 1)
    assert sorted(later for those in ring.released for later in those) == list(range(8))
