"""`chromarpc lora` against a real server."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from chromarpc.cli import app
from tests.conftest import RunningServer
from tests.integration.loras.recorded import RECORDED, sha256_of


class Shell:
    """Runs the command against one server."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server

    def __call__(self, *arguments: str) -> Any:
        result = CliRunner().invoke(app, list(arguments), env={"CHROMARPC_TARGET": self._server.target})
        assert "Traceback" not in result.stderr
        return result


@pytest.fixture
def shell(library_server: RunningServer) -> Shell:
    return Shell(library_server)


def test_the_command_uploads_lists_inspects_and_deletes(shell: Shell) -> None:
    assert shell("lora", "ls").stderr == "the server has no LoRAs\n"
    path = f"sha256:{sha256_of(RECORDED / 'aitk.safetensors')}"
    uploaded = shell("lora", "upload", str(RECORDED / "aitk.safetensors"), "--name", "mine")
    assert (uploaded.exit_code, uploaded.stdout) == (0, f"{path}\n")
    listed = shell("lora", "ls").stdout
    assert listed.startswith(path)
    assert listed.endswith("upload  mine\n")
    entry = json.loads(shell("lora", "ls", "--json").stdout)["loras"][0]
    assert (entry["path"], entry["source"], entry["filename"]) == (path, "upload", "mine")
    inspected = shell("lora", "inspect", path).stdout
    assert "ai-toolkit LoRA" in inspected
    assert "double_blocks.0" in inspected
    assert "█" in inspected
    assert re.search(r"double_blocks\.0 +\S+ +[\d.]+ %", inspected)
    blocks = json.loads(shell("lora", "inspect", path, "--json").stdout)["blocks"]
    assert {"block", "norm", "rms", "has_magnitude", "relative_norm"} == set(blocks[0])
    assert shell("lora", "rm", path).exit_code == 0
    again = shell("lora", "rm", path)
    assert (again.exit_code, again.stderr) == (2, "error: path: the server has no upload with this hash\n")
    assert shell("lora", "upload", "/no/such/file").exit_code == 2


def test_control_characters_are_never_shown_raw(shell: Shell, root: Path, tmp_path: Path) -> None:
    evil = "evil\x1b[31m\x07\u202e"
    shutil.copy(RECORDED / "aitk.safetensors", root / f"{evil}.safetensors")
    save_file(
        {
            **load_file(RECORDED / "kohya.safetensors"),
            f"{evil}.lora_A.weight": torch.ones(1, 1),
        },
        tmp_path / "b",
        {evil: f"{evil}\r\n", "ss_base_model_version": evil},
    )
    uploaded = shell("lora", "upload", str(tmp_path / "b"), "--name", evil)
    outputs = [
        uploaded,
        shell("lora", "ls"),
        shell("lora", "inspect", f"{evil}.safetensors"),
        shell("lora", "inspect", uploaded.stdout.strip()),
        shell("lora", "inspect", evil),
        shell("lora", "rm", evil),
    ]
    for output in outputs:
        text = output.stdout + output.stderr
        assert not any(character in text for character in "\x1b\x07\u202e\r")
    assert "evil�[31m��.safetensors" in outputs[1].stdout
    assert "evil\\x1b" in outputs[3].stdout
