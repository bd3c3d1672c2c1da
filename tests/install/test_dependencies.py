"""What is imported is declared where it is needed, and the light install runs with what it declares."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests import smaller_install
from tools.check_dependencies import AREAS, Import, declared, imports, installed_modules, main, problems

INSTALLED = installed_modules()
PROJECT = tomllib.loads((smaller_install.ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_import_of_this_project_is_declared_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("client/chromarpc/cli/new.py", "import numpy", "numpy is not declared in base; numpy has it"),
        ("client/chromarpc/cli/new.py", "def f():\n    from pydantic import BaseModel", "is not declared in base"),
        ("client/chromarpc/new.py", "from grpc_reflection.v1alpha import reflection", "grpcio-reflection has it"),
        ("server/chromarpc_server/new.py", "import idna", "idna is not declared in base or server; idna has it"),
        ("server/chromarpc_server/new.py", "from opentelemetry import trace", "opentelemetry-api has it"),
        ("server/chromarpc_server/new.py", "from google.rpc import status_pb2", "googleapis-common-protos has it"),
        ("server/chromarpc_server/new.py", "import no_such_thing", "nothing that is installed has it"),
        ("server/chromarpc_server/observability/tracing.py", "from opentelemetry import trace", ""),
        ("server/chromarpc_server/new.py", "import torch, grpc\nfrom google.protobuf import any_pb2", ""),
        ("tests/new.py", "import trustme", ""),
    ],
)
def test_what_only_another_extra_installs_is_found(tmp_path: Path, file: str, line: str, told: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    (path.parent / "__init__.py").touch()
    path.write_text(line)
    # As if only another package had brought it.
    extras = {**declared(PROJECT), "base": declared(PROJECT)["base"] - {"googleapis-common-protos"}}
    said = [one for one in problems(list(imports(path, tmp_path)), extras, INSTALLED) if file in one]
    assert len(said) == bool(told)
    assert all(told in one for one in said)


def test_what_nothing_imports_is_found() -> None:
    told = problems([Import("client/chromarpc/x.py", 1, "grpc")], {"base": frozenset({"grpcio", "six"})},
                    {"grpc": frozenset({"grpcio"})}, {"client/chromarpc": ("base",)})  # fmt: skip
    assert told == ["pyproject.toml: base declares six, which nothing imports"]


def test_the_lower_bounds_are_what_the_stubs_were_generated_for() -> None:
    """Older runtimes refuse the stubs when they are imported."""
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", one).groups() for one in PROJECT["dependencies"])  # type: ignore[union-attr]
    stubs = smaller_install.ROOT / "client" / "chromarpc" / "v1"
    numbers = r"ValidateProtobufRuntimeVersion\(\s*\S+\s*(\d+),\s*(\d+),\s*(\d+)"
    (protobuf,) = {re.search(numbers, path.read_text()).groups() for path in stubs.glob("*_pb2.py")}  # type: ignore[union-attr]
    (grpc,) = {re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", path.read_text()).group(1)  # type: ignore[union-attr]
               for path in stubs.glob("*_pb2_grpc.py")
               if "GRPC_GENERATED" in path.read_text()}  # fmt: skip
    assert _numbers(bounds["protobuf"]) >= tuple(map(int, protobuf))
    assert _numbers(bounds["grpcio"]) >= _numbers(grpc)


@pytest.mark.parametrize("arguments", [("--help",), ("generate", "--help"), ("--version",)])
def test_the_light_install_runs_with_what_it_declares(arguments: tuple[str, ...]) -> None:
    told = smaller_install.run("hide_all_but_requirements_of('chromarpc')", "chromarpc", *arguments)
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout


def test_every_area_is_there() -> None:
    assert all((smaller_install.ROOT / area).exists() for area in AREAS)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, f"{version}.0.0".split(".")[:3]))
