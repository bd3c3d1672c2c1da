"""What a server's start waits for."""

from __future__ import annotations

import subprocess
import sys


def test_a_server_does_not_wait_for_diffusers_before_it_runs() -> None:
    """They are imported while weights are read; at the top of one module they would be a few seconds before it."""
    code = "import sys, chromarpc_server.app; print(*{'diffusers', 'transformers', 'torchao'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "", f"imported at once: {told.stdout}"
