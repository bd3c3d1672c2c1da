"""Server reflection under both of its names, as tools that know nothing of the server ask for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2

from tests.conftest import RunningServer
from tests.integration.test_foreign_client import BUF

VERSIONS = ("v1", "v1alpha")
OWN = {
    "chromarpc.compat.v1.InferenceService",
    "chromarpc.v1.GenerationService",
    "chromarpc.v1.JobService",
    "chromarpc.v1.LoraService",
    "chromarpc.v1.ModelService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
}
EXTENSION = reflection_pb2.ExtensionRequest(
    containing_type="google.protobuf.MethodOptions", extension_number=72295728
)
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"list_services": ""},
    *({"file_containing_symbol": name} for name in sorted(OWN)),
    {"file_containing_symbol": "chromarpc.v1.GenerationService.Generate"},
    {"file_containing_symbol": "chromarpc.v1.Accepted"},
    {"file_containing_symbol": "chromarpc.v1.Nothing"},
    {"file_by_filename": "chromarpc/compat/v1/inference_service.proto"},
    {"file_by_filename": "google/api/annotations.proto"},
    {"file_by_filename": "grpc/reflection/v1/reflection.proto"},
    {"file_by_filename": "nothing.proto"},
    {"file_containing_extension": EXTENSION},
    {"all_extension_numbers_of_type": "google.protobuf.MethodOptions"},
    {"all_extension_numbers_of_type": "chromarpc.v1.Nothing"},
    {},
)


def ask(server: RunningServer, version: str, *questions: dict[str, Any]) -> list[Any]:
    """The answers; the messages of both versions have the same bytes."""
    requests = [reflection_pb2.ServerReflectionRequest(host="h", **question) for question in questions]
    method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream(
            method,
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        try:
            return list(call(iter(requests), timeout=60))
        except grpc.RpcError as error:
            return [error.code()]


def files(answer: Any) -> dict[str, FileDescriptorProto]:
    parsed = [FileDescriptorProto.FromString(it) for it in answer.file_descriptor_response.file_descriptor_proto]
    return {file.name: file for file in parsed}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_service_is_listed_and_described_with_all_that_it_imports(
    server: RunningServer, version: str
) -> None:
    (listed,) = ask(server, version, {"list_services": ""})
    assert listed != grpc.StatusCode.UNIMPLEMENTED
    names = [service.name for service in listed.list_services_response.service]
    assert set(names) == OWN
    asked = ({"file_containing_symbol": name} for name in names)
    for name, answer in zip(names, ask(server, version, *asked), strict=True):
        told = files(answer)
        package, _, service = name.rpartition(".")
        assert any(
            file.package == package and service in {each.name for each in file.service} for file in told.values()
        ), name
        assert all(imported in told for file in told.values() for imported in file.dependency), name


def test_both_versions_give_the_same_answers(server: RunningServer) -> None:
    older, newer = ask(server, "v1alpha", *QUESTIONS), ask(server, "v1", *QUESTIONS)
    assert newer == older
    kinds = [answer.WhichOneof("message_response") for answer in newer]
    assert kinds[: len(OWN) + 3] == ["list_services_response"] + ["file_descriptor_response"] * (len(OWN) + 2)
    errors = [answer.error_response.error_code for answer in newer if answer.HasField("error_response")]
    assert errors == [5, 5, 5, 3]  # NOT_FOUND for what there is not, INVALID_ARGUMENT for no question
    assert set(files(newer[-4])) >= {"google/api/annotations.proto", "google/api/http.proto"}
    assert 72295728 in newer[-3].all_extension_numbers_response.extension_number


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stock_client_calls_by_it(server: RunningServer, version: str) -> None:
    def curl(path: str, *options: str) -> str:
        command = [BUF, "curl", "--http2-prior-knowledge", "--protocol", "grpc"]
        command += ["--reflect-protocol", f"grpc-{version}", f"http://{server.target}{path}", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert set(curl("", "--list-services").split()) == OWN
    assert '"chroma-mini"' in curl("/chromarpc.v1.ModelService/ListModels", "-d", "{}")


def test_another_package_may_have_brought_the_same_file(tmp_path: Path) -> None:
    """There is one file of a name in a process; what is there first stays, and the server serves all the same."""
    script = tmp_path / "brought.py"
    script.write_text("""
import asyncio
import grpc
from google.protobuf import descriptor_pb2, descriptor_pool

file = descriptor_pb2.FileDescriptorProto(name="grpc/reflection/v1/reflection.proto", package="grpc.reflection.v1")
file.message_type.add(name="ServerReflectionRequest")
file.service.add(name="ServerReflection")
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())

from chromarpc_server.transport.services.reflection import serve_reflection

async def main():
    server = grpc.aio.server()
    serve_reflection(["a.B"], server)

asyncio.run(main())
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
