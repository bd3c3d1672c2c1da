"""Parsed adapters as several devices of a host have them: each file once, and nobody held up who was stopped."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from chromarpc_server.adapters.file import AdapterFile
from chromarpc_server.domain.errors import JobCancelled, LoraInvalid
from chromarpc_server.pipeline import Adapter
from chromarpc_server.runtime import adapter_cache
from chromarpc_server.runtime.adapter_cache import AdapterCache
from tests.tiny_checkpoint import GOLDENS

TARGETS = {
    name: tuple(tensor.shape)
    for name, tensor in load_file(GOLDENS / "cpu_fp32" / "transformer_tiny.safetensors").items()
}
WAIT_S = 30


class _Parser:
    """Parses as ever, once it may; counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.begun = threading.Semaphore(0)
        self.may = threading.Event()
        self._real = adapter_cache.read_checked
        monkeypatch.setattr(adapter_cache, "read_checked", self)

    def __call__(
        self, file: AdapterFile, targets: dict[str, tuple[int, ...]], *, check: Callable[[], None]
    ) -> Adapter:
        self.count += 1
        self.begun.release()
        assert self.may.wait(WAIT_S)
        return self._real(file, targets, check=check)


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> _Parser:
    return _Parser(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> AdapterFile:
    path = tmp_path / "a.safetensors"
    shutil.copyfile(GOLDENS / "adapters" / "aitk.safetensors", path)
    return AdapterFile.of(path, "path")


class _Waiter:
    """A job's check, which tells that it was looked at, and stops it once it shall."""

    def __init__(self) -> None:
        self.looked = threading.Semaphore(0)
        self.stopped = False

    def __call__(self) -> None:
        self.looked.release()
        if self.stopped:
            raise JobCancelled("")

    def wait(self) -> None:
        """Until it was looked at twice: it waits by then."""
        assert self.looked.acquire(timeout=WAIT_S)
        assert self.looked.acquire(timeout=WAIT_S)


def _read(pool: ThreadPoolExecutor, cache: AdapterCache, file: AdapterFile, check: _Waiter) -> Future[Adapter]:
    return pool.submit(cache.read, file, "1", TARGETS, check=check)


@pytest.mark.parametrize("budget", [10**9, 1], ids=["kept", "too-large-to-keep"])
def test_two_devices_that_want_a_file_at_once_parse_it_once(
    parser: _Parser, file: AdapterFile, budget: int
) -> None:
    cache, second = AdapterCache(budget), _Waiter()
    with ThreadPoolExecutor(2) as pool:
        one = _read(pool, cache, file, _Waiter())
        assert parser.begun.acquire(timeout=WAIT_S)
        other = _read(pool, cache, file, second)
        second.wait()
        assert not cache.has_parsed(file)
        parser.may.set()
        assert one.result(WAIT_S) is other.result(WAIT_S)
    assert parser.count == 1
    assert cache.has_parsed(file) is (budget > 1)


def test_whoever_waits_for_anothers_parsing_can_be_stopped(parser: _Parser, file: AdapterFile) -> None:
    cache, second = AdapterCache(10**9), _Waiter()
    with ThreadPoolExecutor(2) as pool:
        one = _read(pool, cache, file, _Waiter())
        assert parser.begun.acquire(timeout=WAIT_S)
        other = _read(pool, cache, file, second)
        second.wait()
        second.stopped = True
        assert isinstance(other.exception(WAIT_S), JobCancelled)
        assert not one.done()
        parser.may.set()
        assert one.result(WAIT_S).size_bytes == file.size_bytes


def test_who_waits_parses_itself_where_the_first_one_was_stopped(parser: _Parser, file: AdapterFile) -> None:
    cache, first, second = AdapterCache(10**9), _Waiter(), _Waiter()
    with ThreadPoolExecutor(2) as pool:
        one = _read(pool, cache, file, first)
        assert parser.begun.acquire(timeout=WAIT_S)
        other = _read(pool, cache, file, second)
        second.wait()
        first.stopped = True
        parser.may.set()
        assert isinstance(one.exception(WAIT_S), JobCancelled)
        assert other.result(WAIT_S).size_bytes == file.size_bytes
    assert parser.count == 2


def test_each_job_gets_its_own_error_of_a_file_that_cannot_be_used(parser: _Parser, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"no adapter")
    cache, bad = AdapterCache(10**9), AdapterFile.of(path, "path")
    parser.may.set()
    with ThreadPoolExecutor(2) as pool:
        errors = [_read(pool, cache, bad, _Waiter()).exception(WAIT_S) for _ in range(2)]
    assert all(isinstance(error, LoraInvalid) for error in errors)
    assert errors[0] is not errors[1]
    assert not cache.has_parsed(bad)


def test_what_left_the_cache_is_not_said_to_be_parsed(file: AdapterFile, tmp_path: Path) -> None:
    cache = AdapterCache(10**9)
    cache.read(file, "1", TARGETS, check=lambda: None)
    assert cache.has_parsed(file)
    cache.clear()
    assert not cache.has_parsed(file)
    assert cache.size_bytes == 0
