"""docs/architecture.md names every module of the rooms, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server" / "chromarpc_server"
TREE = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("```")[1]
ROOMS = ["cluster", "jobs", "runtime", "adapters", "pipeline", "transport"]


def modules(folder: Path) -> set[str]:
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in folder.glob("*/__init__.py")}


def lines_of(room: str) -> list[str]:
    """The first column of the lines below a room's own."""
    below = re.search(rf"^  {room}/ .*\n((?:    .*\n)+)", TREE, re.MULTILINE)
    assert below is not None, room
    return [line[4:33] for line in below[1].splitlines()]


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_of_a_room_has_its_line_and_no_other_has(room: str) -> None:
    named = [name.removesuffix("/") for line in lines_of(room) for name in line.split()]
    assert sorted(named) == sorted(modules(SERVER / room))


def test_every_room_and_every_module_beside_them_is_named() -> None:
    server = TREE.partition("client/chromarpc/")[0]
    first = re.findall(r"^  (\S.{28})", server, re.MULTILINE)
    named = {name.removesuffix("/") for line in first for name in line.split()}
    assert named == modules(SERVER)
