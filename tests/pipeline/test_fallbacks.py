"""What a device does without is known, and why in words that may leave the server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from chromarpc_server.pipeline.fused import attention, check, plain
from chromarpc_server.pipeline.fused.check import fused_ops

SECOND = torch.device("cuda", 1)
SECRET = "/home/somebody/.triton/cache"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A GPU's kernels, which nobody has checked yet."""
    found = ModuleType("kernels")
    monkeypatch.setitem(sys.modules, "chromarpc_server.pipeline.fused.kernels", found)
    monkeypatch.setattr("chromarpc_server.pipeline.fused.kernels", found, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    forget = getattr(check, "_form", fused_ops).cache_clear
    forget()
    yield found
    forget()


def _check(monkeypatch: pytest.MonkeyPatch, *results: Exception | None) -> list[torch.device]:
    """Has the check of kernels end so, one time after the other. Gives the devices that it was made for."""
    waiting, checked = list(results), []

    def checks(_: ModuleType, device: torch.device) -> None:
        checked.append(device)
        result = waiting.pop(0)
        if result is not None:
            raise result

    monkeypatch.setattr(check, "check_kernels", checks)
    return checked


def test_each_device_is_checked_once(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.device("cuda", 0)
    checked = _check(monkeypatch, RuntimeError("not here"), None)
    assert [fused_ops(first), fused_ops(SECOND), fused_ops(first)] == [plain, kernels, plain]
    assert checked == [first, SECOND]


def test_too_little_memory_says_nothing_of_the_kernels(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check(monkeypatch, RuntimeError("Triton Error [CUDA]: out of memory"), None)
    with pytest.raises(RuntimeError, match="out of memory"):
        fused_ops(SECOND)
    assert fused_ops(SECOND) is kernels


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (RuntimeError(f"{SECRET}: cannot compile"), "RuntimeError"),
        (ImportError(f"{SECRET}/libtriton.so"), "Triton"),
        (None, "0.3"),
    ],
)
def test_why_kernels_are_not_used_is_told_without_a_librarys_words(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, problem: Exception | None, told: str
) -> None:
    _check(monkeypatch, problem or check.WrongResult("a kernel's result is 0.3 off"))
    fallback = check.kernels_fallback(SECOND)
    assert fallback is not None
    assert fallback.without == "kernels"
    assert told in fallback.message
    assert SECRET not in fallback.message


def test_a_cpu_misses_nothing() -> None:
    cpu = torch.device("cpu")
    assert fused_ops(cpu) is plain
    assert check.kernels_fallback(cpu) is None
    assert attention.select_attention(cpu, torch.bfloat16, 64).fallback is None


def test_attention_that_is_installed_and_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_error", lambda *_: 0.5)
    monkeypatch.setattr(attention, "_flash3", SimpleNamespace)
    attention.select_attention.cache_clear()
    found = attention.select_attention(SECOND, torch.bfloat16, 64)
    attention.select_attention.cache_clear()
    assert found.name == "torch"
    assert found.fallback is not None
    assert found.fallback.without == "attention"
