"""The `chromarpc` command, run against one server in an empty folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from chromarpc.cli import app
from tests.client.client_fake_server import FakeServer


def files(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


class Shell:
    """Runs the command against one server, in an empty folder."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def __call__(self, *arguments: str, text_in: str | None = None) -> Any:
        result = CliRunner().invoke(
            app, list(arguments), input=text_in, env={"CHROMARPC_TARGET": self.server.target}
        )
        assert "Traceback" not in result.stderr
        return result
