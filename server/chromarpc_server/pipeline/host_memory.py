"""What the host has free: what the system says, and the limit of the process's control group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 2**60
"""Control groups of version 1 write a number above it where there is no limit."""
_GROUPS = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}
"""By controller, of version 2 and of version 1: files of the limit and of what is used; what of that is cache."""


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """What can be taken without swapping: the page cache counts as free. None where the system does not say.

    `root`: of the files that tell.
    """
    found = [*_system(root), *_control_groups(root)]
    return max(0, min(found)) if found else None


def _system(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc" / "meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _control_groups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        for controller in _GROUPS.keys() & set(controllers.split(",")):
            mount = root / "sys" / "fs" / "cgroup" / controller
            group = mount / path.lstrip("/")
            # In a container the path may be the host's, and the mount the group itself.
            for folder in (group, *group.parents):
                yield from _left(folder, controller)
                if folder == mount:
                    break


def _left(folder: Path, controller: str) -> Iterator[int]:
    """Of one group's limit, where it has one."""
    limit_file, used_file, cached = _GROUPS[controller]
    limit, used = _number(folder / limit_file), _number(folder / used_file)
    if limit is None or used is None or limit >= _NO_LIMIT:
        return
    statistics = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
    yield limit - used + sum(int(statistics.get(name, 0)) for name in cached)


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
