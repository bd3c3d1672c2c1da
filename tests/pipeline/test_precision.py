"""Float32 products on GPUs meet the precision that they ask for, whatever threads of other devices do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.domain.trainer import TrainerSettings
from chromarpc_server.pipeline import (
    PROFILES,
    Checkpoint,
    CheckpointFiles,
    SamplingChoice,
    precision,
    read_adapter,
)
from chromarpc_server.pipeline.models.text_encoder import UnfusedAttention
from chromarpc_server.pipeline.precision import PRODUCT_PRECISION, ProductPrecision, float32_products
from tests.tiny_checkpoint import GOLDENS

CPU = torch.device("cpu")
WAIT_S = 30


def _setting() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    before = _setting()
    yield
    assert _setting() == before


class _Thread:
    """Holds a precision from when it gets it until it is told to let go."""

    def __init__(self, shared: ProductPrecision, wanted: Any, pool: ThreadPoolExecutor) -> None:
        self.has, self.may_go = threading.Event(), threading.Event()
        self._shared, self._wanted = shared, wanted
        self.found = pool.submit(self._run)

    def _run(self) -> str:
        with self._shared.hold(self._wanted):
            self.has.set()
            assert self.may_go.wait(WAIT_S)
            return _setting()


def _until_waiting(shared: ProductPrecision, count: int) -> None:
    while True:
        with shared._changed:
            if len(shared._queue) == count:
                return
            shared._changed.wait(0.01)


@pytest.mark.parametrize(("first", "second"), [("tf32", "ieee"), ("ieee", "tf32"), ("tf32", None), (None, "tf32")])
def test_another_precision_waits_until_nobody_relies_on_this_one(first: Any, second: Any) -> None:
    shared, own = ProductPrecision(), _setting()
    with ThreadPoolExecutor(2) as pool:
        one = _Thread(shared, first, pool)
        assert one.has.wait(WAIT_S)
        other = _Thread(shared, second, pool)
        _until_waiting(shared, 1)
        assert not other.has.is_set()
        one.may_go.set()
        assert other.has.wait(WAIT_S)
        other.may_go.set()
        assert (one.found.result(), other.found.result()) == (first or own, second or own)


def test_what_a_hanging_thread_holds_keeps_no_other_waiting() -> None:
    shared, own = ProductPrecision(), _setting()
    with ThreadPoolExecutor(2) as pool:
        hanging = _Thread(shared, "tf32", pool)
        assert hanging.has.wait(WAIT_S)
        (thread,) = shared._holders
        other = _Thread(shared, "ieee", pool)
        _until_waiting(shared, 1)
        shared.forget(thread)
        assert other.has.wait(WAIT_S)
        hanging.may_go.set()  # what it lets go of now is the other one's
        hanging.found.result()
        assert shared._holders
        other.may_go.set()
        assert other.found.result() == "ieee"
    assert _setting() == own


@pytest.mark.parametrize(("first", "second"), [("tf32", "tf32"), ("ieee", None), (None, "ieee"), (None, None)])
def test_threads_that_want_the_same_have_it_at_once(first: Any, second: Any) -> None:
    shared = ProductPrecision()
    with ThreadPoolExecutor(2) as pool:
        threads = [_Thread(shared, wanted, pool) for wanted in (first, second)]
        assert all(thread.has.wait(WAIT_S) for thread in threads)
        for thread in threads:
            thread.may_go.set()
        assert all((thread.found.result() == "tf32") is (first == "tf32") for thread in threads)


def test_who_comes_later_does_not_pass_one_that_waits() -> None:
    shared = ProductPrecision()
    with ThreadPoolExecutor(3) as pool:
        one = _Thread(shared, "tf32", pool)
        assert one.has.wait(WAIT_S)
        other = _Thread(shared, "ieee", pool)
        _until_waiting(shared, 1)
        later = _Thread(shared, "tf32", pool)
        _until_waiting(shared, 2)
        assert not later.has.is_set()
        one.may_go.set()
        assert other.has.wait(WAIT_S)
        assert not later.has.is_set()
        other.may_go.set()
        later.may_go.set()
        assert [thread.found.result() for thread in (one, other, later)] == ["tf32", "ieee", "tf32"]


def test_a_thread_that_asks_within_what_it_holds_gets_what_it_asks_for_and_then_its_own_again() -> None:
    shared = ProductPrecision()
    with shared.hold("tf32"):
        with shared.hold(None):
            assert _setting() == "tf32"
        with shared.hold("ieee"):
            assert _setting() == "ieee"
            with shared.hold(None):
                assert _setting() == "ieee"
        assert (_setting(), shared.held) == ("tf32", "tf32")
    assert shared.held is None


def test_an_error_inside_leaves_nothing_held() -> None:
    shared = ProductPrecision()
    with pytest.raises(KeyError), shared.hold("tf32"), shared.hold("ieee"):
        raise KeyError
    assert (shared.held, shared._holders) == (None, set())


def test_a_cpu_changes_nothing_and_waits_for_nobody() -> None:
    with float32_products(CPU, "tf32"):
        assert PRODUCT_PRECISION.held is None


class _Products(TorchDispatchMode):
    """Every float32 product, and whether its thread holds a precision."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._loose: set[str] = set()

    def take(self) -> list[str]:
        """Those since the last look that were given while nothing was held."""
        loose, self._loose = sorted(self._loose), set()
        return loose

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_product = name in self.NAMES or name.startswith("_scaled_dot_product")
        if is_product and args[0].dtype == torch.float32:
            self.count += 1
            if PRODUCT_PRECISION.held is None:
                self._loose.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Products]:
    monkeypatch.setattr(precision, "_is_shared", lambda _: True)
    with _Products() as products:
        yield products


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_float32_product_is_given_while_a_precision_is_held(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Else another device's thread could have it computed in its own precision."""
    files = CheckpointFiles(
        transformer=tiny_checkpoint / "chroma-mini.safetensors",
        text_encoder=tiny_checkpoint / "text_encoder_2",
        tokenizer=tiny_checkpoint / "tokenizer_2",
        vae=tiny_checkpoint / "vae",
    )
    loose: dict[str, list[str]] = {}
    with _as_on_a_gpu(monkeypatch) as products:
        checkpoint = Checkpoint.load(files, device=CPU, dtype=dtype)
        loose["loading"] = products.take()
        adapters = [
            (read_adapter(GOLDENS / "adapters" / f"{name}.safetensors", checkpoint.targets), 0.5)
            for name in ("aitk", "aitk_lokr_lowrank", "loha", "kohya_dora", "mixed_rank_alpha")
        ]
        for name, profile in PROFILES.items():
            trainer = TrainerSettings(dtype=str(dtype).removeprefix("torch.")) if profile.trainer else None
            pipeline = checkpoint.prepare(adapters, profile, trainer)
            embedding = pipeline.encode(pipeline.tokenize("a"))
            *_, last = pipeline.denoise(
                embedding, width=32, height=32, steps=1, guidance_scale=4.0, seed=1, noise_draw="float32"
            )
            pipeline.decode(last.latents, 32, 32)
            pipeline.preview(last, 32, 32, 32)
            loose[name] = products.take()
        choice = SamplingChoice("heun", "beta", settings=DrawingSettings.COMFYUI)
        pipeline = checkpoint.prepare(adapters, PROFILES["reference"], rounded=False)
        embedding = pipeline.encode(pipeline.tokenize("a (b:1.2)", choice.settings))
        *_, last = pipeline.denoise(
            embedding,
            width=32,
            height=32,
            steps=2,
            guidance_scale=4.0,
            seed=1,
            noise_draw="float32",
            choice=choice,
        )
        pipeline.decode(last.latents, 32, 32, choice.settings)
        loose["as ComfyUI"] = products.take()
    assert {where: found for where, found in loose.items() if found} == {}
    assert products.count > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_unfused_attention_gives_the_bits_of_torchs_own_chain_and_leaves_the_process_alone(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=generator).to(dtype) for _ in range(3))
    bias = torch.randn(1, 2, 64, 64, generator=generator).to(dtype)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    with UnfusedAttention():
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=0.0, scale=1.0)
        with ThreadPoolExecutor(1) as pool:
            flags = pool.submit(torch.backends.cuda.flash_sdp_enabled).result()
    assert torch.equal(found, expected)
    assert flags
