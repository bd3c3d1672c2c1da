"""The contract as a stranger's tools find it: linted, built and generated from nothing but the tracked files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import MethodOptions

from chromarpc.compat.v1 import inference_service_pb2
from chromarpc.v1 import (
    codes_pb2,
    generation_service_pb2,
    job_event_pb2,
    job_service_pb2,
    lora_service_pb2,
    model_service_pb2,
    options_pb2,
)

ROOT = Path(__file__).parents[2]
BUF = Path(sys.executable).parent / "buf"
V1 = (
    codes_pb2,
    generation_service_pb2,
    job_event_pb2,
    job_service_pb2,
    lora_service_pb2,
    model_service_pb2,
    options_pb2,
)
REPEATABLE = {
    "AppendLoraUpload",
    "CancelJob",
    "DeleteJob",
    "DeleteLora",
    "FinalizeLoraUpload",
    "InspectLora",  # it may download what a URL names
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a bare clone holds of the contract: the tracked files, as they are now."""
    folder = tmp_path_factory.mktemp("clone")
    wanted = ["protos", "buf.yaml", "buf.gen.yaml"]
    listed = subprocess.run(["git", "ls-files", "-z", *wanted], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def outcome(folder: Path, *command: str | Path) -> str:
    """Nothing, or what the command ended with."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return "" if done.returncode == 0 else f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("lint",),
        ("build", "-o", "contract.binpb"),
        ("breaking", "protos", "--against", "protos/chromarpc.v1.binpb"),
    ],
)
def test_buf_takes_a_bare_clone(clone: Path, arguments: tuple[str, ...]) -> None:
    assert outcome(clone, BUF, *arguments) == ""


GENERATED = {
    "cpp": "chromarpc/v1/job_event.pb.h",
    "csharp": "Chromarpc/V1/JobEvent.cs",
    "java": "chromarpc/v1/JobEvent.java",
    "kotlin": "chromarpc/v1/JobEventKt.kt",
    "objc": "chromarpc/v1/JobEvent.pbobjc.h",
    "php": "Chromarpc/V1/JobEvent.php",
    "python": "chromarpc/v1/job_event_pb2.pyi",
    "ruby": "chromarpc/v1/job_event_pb.rb",
}


def test_a_bare_clone_generates_every_language_of_protoc(clone: Path) -> None:
    if shutil.which("protoc") is None:
        pytest.skip("apt-get install protobuf-compiler")
    assert outcome(clone, BUF, "generate") == ""
    missing = [name for language, name in GENERATED.items() if not (clone / "out/gen" / language / name).is_file()]
    assert missing == []
    # What other packages bring is not made a second time.
    assert not list((clone / "out/gen").rglob("google/*"))


def test_protoc_alone_generates_them_too(clone: Path, tmp_path: Path) -> None:
    if shutil.which("protoc") is None:
        pytest.skip("apt-get install protobuf-compiler")
    protos = sorted(str(path.relative_to(clone)) for path in (clone / "protos/chromarpc").rglob("*.proto"))
    for language, name in GENERATED.items():
        options = {"csharp": "--csharp_opt=base_namespace=", "python": f"--pyi_out={tmp_path / language}"}
        (tmp_path / language).mkdir()
        command = ["protoc", "-I", "protos", f"--{language}_out={tmp_path / language}", *protos]
        command += [options[language]] if language in options else []
        assert outcome(clone, *command) == ""
        assert (tmp_path / language / name).is_file()


@pytest.mark.parametrize("language", ["go", "php"])
def test_protoc_generates_as_the_page_says(clone: Path, language: str) -> None:
    """The command lines of docs/web.md, with the plugins that this machine has."""
    page = (ROOT / "docs/web.md").read_text()
    lines = re.findall(rf"^```{language}\n\W+(protoc .*\.proto)", page, re.MULTILINE)
    assert len(lines) == 1
    (clone / "gen").mkdir(exist_ok=True)
    wanted = [f"protoc-gen-{name}" for name in re.findall(r"--(go\S*)_out=", lines[0])]
    wanted += ["protoc", *re.findall(r"--plugin=\S+?=(\S+)", lines[0])]
    lacking = [program for program in wanted if not shutil.which(program)]
    if lacking:
        pytest.skip(f"not installed: {', '.join(lacking)}")
    assert outcome(clone, "sh", "-c", lines[0]) == ""


@pytest.mark.parametrize("option", ["paths=source_relative", "module=chromarpc"])
def test_go_takes_each_way_of_laying_out_files(clone: Path, tmp_path: Path, option: str) -> None:
    if shutil.which("protoc-gen-go") is None:
        pytest.skip("apt-get install protoc-gen-go")
    protos = sorted(str(path.relative_to(clone)) for path in (clone / "protos/chromarpc").rglob("*.proto"))
    assert outcome(clone, "protoc", "-I", "protos", f"--go_out={tmp_path}", f"--go_opt={option}", *protos) == ""
    base = tmp_path if option.startswith("module") else tmp_path / "chromarpc"
    assert "package chromarpcv1\n" in (base / "v1/job_event.pb.go").read_text()
    assert "package compatv1\n" in (base / "compat/v1/inference_service.pb.go").read_text()


def test_every_language_has_its_package() -> None:
    def told(module: Any) -> dict[str, Any]:
        return {field.name: value for field, value in module.DESCRIPTOR.GetOptions().ListFields()}

    for module in V1:
        assert told(module) == {
            "csharp_namespace": "Chromarpc.V1",
            "go_package": "chromarpc/v1;chromarpcv1",
            "java_multiple_files": True,
            "java_outer_classname": _camel(module.DESCRIPTOR.name) + "Proto",
            "java_package": "chromarpc.v1",
            "objc_class_prefix": "CRP",
            "php_metadata_namespace": r"Chromarpc\V1\GPBMetadata",
            "php_namespace": r"Chromarpc\V1",
            "ruby_package": "Chromarpc::V1",
            "swift_prefix": "Chromarpc_V1_",
        }
    compat = told(inference_service_pb2)
    assert compat["go_package"] == "chromarpc/compat/v1;compatv1"
    assert set(compat) == set(told(options_pb2))


def test_calls_that_only_read_and_calls_that_may_be_repeated_are_marked() -> None:
    levels = {method.name: method.GetOptions().idempotency_level for method in _methods()}
    reads = {name for name in levels if name.startswith(("Get", "List", "Watch", "Download"))}
    assert {name for name, level in levels.items() if level == MethodOptions.NO_SIDE_EFFECTS} == reads
    assert {name for name, level in levels.items() if level == MethodOptions.IDEMPOTENT} == REPEATABLE


def test_generating_stubs_leaves_the_last_release_s_contract_alone() -> None:
    """`buf breaking` compares with it; whoever changes the contract must not move it along."""
    done = subprocess.run(["make", "-n", "protos"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "generate_stubs.sh" in done.stdout
    assert "binpb" not in done.stdout


def _methods() -> Iterator[Any]:
    for module in (*V1, inference_service_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in Path(name).stem.split("_"))
