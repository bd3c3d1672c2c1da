"""Another process that finds only some of the installed packages, as in an install with fewer extras."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


class Missing(importlib.abc.MetaPathFinder):
    """Answers for modules that are not to be found."""

    def __init__(self, modules: Collection[str]) -> None:
        self._modules = modules

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in self._modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def hide(modules: Collection[str]) -> None:
    """From here on these modules are not to be found in this process."""
    sys.meta_path.insert(0, Missing(frozenset(modules)))


def hide_all_but_requirements_of(distribution: str) -> None:
    """From here on this process finds what the distribution requires without extras, and nothing else."""
    kept = _closure([distribution])
    modules: dict[bool, set[str]] = {True: set(), False: set()}
    for one in importlib.metadata.distributions():
        modules[_canonical(one.metadata["Name"]) in kept].update(_modules(one))
    hide(modules[False] - modules[True])


def run(prelude: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs `chromarpc …` or `chromarpc-server …` after the prelude, which calls one of the functions above."""
    program = {"chromarpc": "chromarpc.cli", "chromarpc-server": "chromarpc_server.__main__"}[command[0]]
    code = (
        f"import sys; from tests import smaller_install; smaller_install.{prelude}; "
        f"sys.argv = {list(command)!r}; from {program} import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def _closure(names: Iterable[str]) -> set[str]:
    waiting, found = [(name, frozenset[str]()) for name in names], set[tuple[str, frozenset[str]]]()
    while waiting:
        name, extras = one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        for requirement in importlib.metadata.requires(name) or ():
            wanted = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", requirement)
            extra = re.search(r"""extra == ['"]([\w.-]+)['"]""", requirement)
            if wanted and (extra is None or extra.group(1) in extras) and _is_installed(wanted.group(1)):
                more = frozenset(part.strip() for part in (wanted.group(2) or "").split(",") if part.strip())
                waiting.append((_canonical(wanted.group(1)), more))
    return {name for name, _ in found}


def _modules(distribution: importlib.metadata.Distribution) -> set[str]:
    found = set()
    for file in distribution.files or ():
        if file.suffix in (".py", ".so", ".pyd") and ".." not in file.parts:
            parts = [*file.parts[:-1], file.name.partition(".")[0]]
            found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
