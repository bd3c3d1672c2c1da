"""`chromarpc sweep`: sheets of pictures over multipliers, against a real server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from chromarpc.cli import app
from chromarpc.cli.sweep import LABEL_PX, MARGIN_PX
from tests.conftest import RunningServer
from tests.tiny_checkpoint import GOLDENS

SMALL = ["--model", "chroma-mini", "--width", "64", "--height", "64", "--steps", "1", "--tile", "64"]


@pytest.fixture
def loras(lora_root: Path) -> Path:
    for name in ("aitk", "kohya"):
        shutil.copy(GOLDENS / "adapters" / f"{name}.safetensors", lora_root)
    return lora_root


def _run(server: RunningServer, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, ["sweep", *arguments, *SMALL], env={"CHROMARPC_TARGET": server.target, "NO_COLOR": "1"}
    )
    return result.exit_code, result.stderr


def _cells(path: Path) -> tuple[float, float]:
    with Image.open(path) as sheet:
        width, height = sheet.size
    return (width - MARGIN_PX) / (64 + MARGIN_PX), (height - LABEL_PX - MARGIN_PX) / (64 + LABEL_PX + MARGIN_PX)


@pytest.mark.usefixtures("loras")
@pytest.mark.parametrize(
    ("arguments", "cells"),
    [
        (["a", "--lora", "aitk.safetensors:0,1,2"], (3, 1)),
        (["a", "b", "--lora", "kohya.safetensors:0.8", "--lora", "aitk.safetensors:0,1"], (2, 2)),
        (["a", "--lora", "kohya.safetensors:0,1", "--lora", "aitk.safetensors:0,0.5,1"], (3, 2)),
        (["a", "b", "--lora", "aitk.safetensors:1"], (1, 2)),
    ],
)
def test_the_sheet_has_a_cell_for_every_combination(
    server: RunningServer, tmp_path: Path, arguments: list[str], cells: tuple[int, int]
) -> None:
    output = tmp_path / "sheet.png"
    assert _run(server, *arguments, "-o", str(output))[0] == 0
    assert _cells(output) == cells


@pytest.mark.usefixtures("loras")
def test_multipliers_change_the_pictures(server: RunningServer, tmp_path: Path) -> None:
    output = tmp_path / "sheet.png"
    assert _run(server, "a", "--lora", "aitk.safetensors:0,2", "-o", str(output))[0] == 0
    top = 2 * LABEL_PX + MARGIN_PX
    with Image.open(output) as sheet:
        left, right = (sheet.crop((x, top, x + 64, top + 64)).tobytes() for x in (MARGIN_PX, 2 * MARGIN_PX + 64))
    assert left != right


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--lora", "x.safetensors"], "PATH:MULTIPLIER"),
        (["a", "--lora", "x.safetensors:1,"], "PATH:MULTIPLIER"),
        (["a", "--lora", "x.safetensors:nan"], "PATH:MULTIPLIER"),
        (["a", "b", "--lora", "x:0,1", "--lora", "y:0,1"], "at most one"),
        (["a", "--lora", "x:" + ",".join("1" * 300)], "more than 256"),
        (["a", "--lora", "missing.safetensors:0,1"], "no such adapter"),
    ],
)
def test_what_cannot_be_drawn_is_said(server: RunningServer, arguments: list[str], words: str) -> None:
    code, said = _run(server, *arguments)
    assert code not in (0, 1)
    assert words in said
