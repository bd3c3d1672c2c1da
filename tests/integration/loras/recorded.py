"""Adapters that were recorded, and what calls about them have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc.errors import from_status
from tests.tiny_checkpoint import GOLDENS

RECORDED = GOLDENS / "adapters"
SMALL: dict[str, Any] = {
    "model": "chroma-mini",
    "width": 64,
    "height": 64,
    "sample_steps": 2,
    "guidance_scale": 1.0,
}


def refused(call: Callable[[], object]) -> chromarpc.StatusError:
    """The error of a bare stub's call, as the client would raise it."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    return from_status(error.code(), error.details(), error.trailing_metadata(), target="")


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
