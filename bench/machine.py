"""What a bench writes beside its figures."""

from __future__ import annotations

import os
import subprocess


def commit() -> str:
    """Of the code that was measured; `COMMIT` in the environment says it where there is no repository."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
