"""What must be the same on the server and on a host, so that a picture is the same whoever draws it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from chromarpc_server.pipeline import library_versions

CODE = "chromarpc's code"


@cache
def own_versions() -> Mapping[str, str]:
    """Of this process: every library that the numbers depend on, and a hash of our own code. Reads files."""
    # Ray itself asks for the same minor version of Python.
    libraries = {name: version for name, version in library_versions().items() if name != "python"}
    return {**libraries, CODE: _code_hash()}


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """What differs, as `torch 2.11.0 instead of 2.13.0`, ours last."""
    return [
        f"{name} {theirs.get(name, 'unknown')} instead of {ours.get(name, 'unknown')}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def _code_hash() -> str:
    """Two installs of one version may still hold different code."""
    root = Path(str(resources.files("chromarpc_server")))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
