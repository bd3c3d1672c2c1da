"""What is known of the store at a moment, for metrics and status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StoreFacts:
    """Counts are since the process began, but for those of files, which are as of the last sweep."""

    free_bytes: int | None = None
    """Of the data folder's disk; None for a store in memory."""
    reserve_bytes: int = 0
    """With less than this free, nothing new is taken."""
    wal_bytes: int = 0
    """Of SQLite's write-ahead log."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Failed calls, by what was asked of the store."""
    damaged: Mapping[str, int] = field(default_factory=dict)
    """Damage that was met, by what is damaged: `image`, `row`, `database`."""
    lost_files: int = 0
    """Images in lost+found."""
    lost_bytes: int = 0
    swept_s_ago: float = 0.0
    """Seconds since what need not be kept longer was last forgotten; since the start where it never was."""
    clock_ahead_s: float = 0.0
    """How far the wall clock is ahead of the store's own time, or, negative, behind it."""
    clock_steps: int = 0
    """How often the wall clock was seen to jump."""
