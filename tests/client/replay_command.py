"""The `chromarpc replay` command, run on one folder against a server that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from chromarpc.cli import app
from tests.client.replay_fake_server import DrawingServer, report


class Replay:
    """Runs the command on one folder, with its report beside it."""

    def __init__(self, server: DrawingServer, folder: Path, out: Path) -> None:
        self.server, self.folder, self.out = server, folder, out

    def __call__(self, *arguments: str, exit_code: int = 0) -> Any:
        result = CliRunner().invoke(
            app,
            ["replay", str(self.folder), "--out", str(self.out), *arguments],
            env={"CHROMARPC_TARGET": self.server.target},
        )
        assert "Traceback" not in result.stderr
        assert result.exit_code == exit_code, result.stderr
        return result

    @property
    def facts(self) -> dict[str, Any]:
        return report(self.out)

    def sample(self, step: int, index: int) -> dict[str, Any]:
        return next(one for one in self.facts["samples"] if (one["step"], one["index"]) == (step, index))
