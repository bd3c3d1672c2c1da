"""Checks that what the code imports is declared, in the extra that installs it, and that what is declared is used.

Each module that is imported is traced to the distribution that installed its file, so `google.rpc` and
`google.protobuf` are two things, and what came only because another package wanted it is found.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST_PARTY = frozenset({"chromarpc", "chromarpc_server", "tests", "tools", "bench"})

BASE = "base"
"""Stands for `project.dependencies` among the extras."""
AREAS: Mapping[str, tuple[str, ...]] = {
    "client/chromarpc": (BASE,),
    "server/chromarpc_server": (BASE, "server"),
    "server/chromarpc_server/observability/tracing.py": (BASE, "server", "otel"),
    "server/chromarpc_server/cluster/ray_driver.py": (BASE, "server", "ray"),
    "server/chromarpc_server/gateway/envoy.py": (BASE, "server", "web"),
    "server/chromarpc_server/pipeline/fused/attention.py": (BASE, "server", "fa3"),
    "tests": (BASE, "server", "otel", "web", "dev"),
    "tools": (BASE, "server", "otel", "web", "dev"),
    "bench": (BASE, "server", "otel", "web", "dev"),
}
"""What the code below each path may import; the longest path that holds a file counts."""
NOT_ON_EVERY_MACHINE: Mapping[str, str] = {
    "fa3_fwd_interface": "fa3-fwd",
    "ray": "ray",
    "flash_attn_interface": "",  # built by hand from FlashAttention's sources
    "triton": "",  # comes with torch's CUDA builds
}
"""Modules that need not be installed where this runs, and what installs them; nothing declared where empty."""
NOT_IMPORTED: Mapping[str, str] = {
    "buf-bin": "a command",
    "coverage": "a command",
    "grpcio-tools": "run by tools/generate_stubs.sh",
    "import-linter": "a command",
    "mypy": "a command",
    "mypy-protobuf": "run by tools/generate_stubs.sh",
    "pytest-timeout": "a plugin of pytest",
    "ruff": "a command",
    "scipy-stubs": "types for mypy",
}
"""What is declared and needed although no line imports it; stubs (types-…) need not be named."""


@dataclass(frozen=True)
class Import:
    """One import of something that is neither ours nor Python's."""

    file: str
    line: int
    module: str


def distribution_name(requirement: str) -> str:
    """`httpcore2[asyncio]>=2.0; extra == "x"` → `httpcore2`, spelled as PyPI does."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return _canonical(found.group() if found else requirement)


def declared(project: Mapping[str, object]) -> dict[str, frozenset[str]]:
    """Distributions by extra, from pyproject.toml's `project` table."""
    extras = {BASE: project["dependencies"], **_mapping(project["optional-dependencies"])}
    return {extra: frozenset(map(distribution_name, _strings(listed))) for extra, listed in extras.items()}


def imports(path: Path, root: Path = ROOT) -> Iterator[Import]:
    """Every import in a file: at its top, inside a function, for type checkers only."""
    beside = () if (path.parent / "__init__.py").is_file() else path.parent.glob("*.py")
    local = {sibling.stem for sibling in beside}
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from google.rpc import status_pb2` is about the module google.rpc.status_pb2.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in FIRST_PARTY and top not in local:
                yield Import(path.relative_to(root).as_posix(), node.lineno, name)


def installed_modules() -> dict[str, frozenset[str]]:
    """Distributions by the modules and packages whose files they installed."""
    found: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        name = _canonical(distribution.metadata["Name"])
        for file in distribution.files or ():
            if file.suffix in (".py", ".so", ".pyd") and ".." not in file.parts:
                parts = [*file.parts[:-1], file.name.partition(".")[0]]
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found.setdefault(module, set()).add(name)
    return {module: frozenset(names) for module, names in found.items()}


def providers(module: str, installed: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """What installed a module, or the innermost package around the name that has a file."""
    while module:
        if module in installed:
            return installed[module]
        module = module.rpartition(".")[0]
    return frozenset()


def problems(
    found: Sequence[Import],
    extras: Mapping[str, frozenset[str]],
    installed: Mapping[str, frozenset[str]],
    areas: Mapping[str, tuple[str, ...]] = AREAS,
) -> list[str]:
    """What is wrong, a line for each: undeclared imports, then unused declarations."""
    wrong: list[str] = []
    used: dict[str, set[str]] = {extra: set() for extra in extras}
    for one in found:
        area = max((path for path in areas if f"{one.file}/".startswith(f"{path}/")), key=len)
        allowed = {name for extra in areas[area] for name in extras[extra]}
        elsewhere = NOT_ON_EVERY_MACHINE.get(one.module.partition(".")[0])
        if elsewhere == "":
            continue
        by = frozenset({elsewhere}) if elsewhere else providers(one.module, installed)
        if not by & allowed:
            where = f"{one.file}:{one.line}"
            came = f"{' or '.join(sorted(by))} has it" if by else "nothing that is installed has it"
            wrong.append(f"{where}: {one.module} is not declared in {' or '.join(areas[area])}; {came}")
        for extra in areas[area]:
            used[extra] |= by & extras[extra]
    for extra, names in extras.items():
        unused = sorted(names - used[extra] - NOT_IMPORTED.keys())
        wrong += [
            f"pyproject.toml: {extra} declares {name}, which nothing imports"
            for name in unused
            if not name.startswith("types-")
        ]
    return wrong


def main() -> int:
    """Prints what is wrong. Returns 1 where something is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = [
        one
        for area in AREAS
        if (ROOT / area).is_dir()
        for path in sorted((ROOT / area).rglob("*.py"))
        for one in imports(path)
    ]
    wrong = problems(found, declared(project), installed_modules())
    for line in dict.fromkeys(wrong):
        print(line, file=sys.stderr)
    if not wrong:
        print(f"Every import is declared ({len(found)} of other packages).")
    return 1 if wrong else 0


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError("not a table")
    return value


def _strings(value: object) -> list[str]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return [str(item) for item in value]


if __name__ == "__main__":
    sys.exit(main())
