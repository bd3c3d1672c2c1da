"""A server without an adapter root says so, and the same of every path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import chromarpc
from tests.conftest import RunningServer


def test_a_server_without_a_root_says_what_its_operator_sets(
    serve: Callable[..., RunningServer], tmp_path: Path
) -> None:
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"x")
    told = set()
    with chromarpc.Client(serve().target) as client:
        for path in ("a.safetensors", "a/b.safetensors", "../a.safetensors", str(there), f"{there}.none", "/etc"):
            with pytest.raises(chromarpc.LoraNotFound) as caught:
                list(client.generate("a", model="chroma-mini", loras=path))
            told.add(caught.value.message)
            with pytest.raises(chromarpc.LoraNotFound) as caught:
                client.inspect_lora(path, model="chroma-mini")
            told.add(caught.value.message)
        assert len(told) == 1
        assert "serves no adapters from its disk" in told.pop()
        assert "--lora-root" in caught.value.message
        assert list(client.list_loras()) == []
