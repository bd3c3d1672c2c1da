"""Counts and logs stored adapters that are found damaged, each once until it is healed. Any thread may call it."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)

_lock = threading.Lock()
_damaged: set[tuple[str, str]] = set()
"""What is damaged now, as far as it was read: hash, and which of its files."""
_found = 0


def report_damage(sha256: str, what: str) -> None:
    """Notes that a file is damaged.

    Args:
        sha256: the hash that the adapter is named by.
        what: which of its files: `content`, or the note of its `owners`.
    """
    global _found  # noqa: PLW0603 - the process has one count, which a metric shows
    with _lock:
        if (sha256, what) in _damaged:
            return
        _damaged.add((sha256, what))
        _found += 1
    log.error("adapter.damaged", extra={"sha256": sha256, "what": what})


def report_healed(sha256: str) -> None:
    """Notes that an adapter's files were written anew, or deleted."""
    with _lock:
        _damaged.difference_update({(sha256, "content"), (sha256, "owners")})


def damaged_adapters() -> int:
    """How many files of uploaded and downloaded adapters this process has found damaged."""
    return _found
