"""Statuses and their details to exceptions."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2

import chromarpc
from chromarpc import errors
from chromarpc.errors import CODE_ERRORS, REASON_ERRORS, StatusError, error_type, from_status
from chromarpc.v1 import codes_pb2
from tests.client.client_fake_server import detailed_status

KEY = "grpc-status-details-bin"


def trailing(status: status_pb2.Status) -> tuple[tuple[str, bytes], ...]:
    return ((KEY, status.SerializeToString()),)


def test_every_status_code_has_an_error() -> None:
    assert set(CODE_ERRORS) == set(grpc.StatusCode)


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_a_bare_status_of_any_code_becomes_its_error(code: grpc.StatusCode) -> None:
    error = from_status(code, "", None, target="host:1")
    assert type(error) is CODE_ERRORS[code]
    assert error.code is code
    assert error.message
    assert (error.reason, error.violations, error.retry_after_s) == ("", (), None)


def test_every_error_is_reachable_and_drawn_in_the_tree() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.ChromarpcError)
    }
    reachable = {*CODE_ERRORS.values(), *REASON_ERRORS.values()}
    assert classes - reachable == {errors.ChromarpcError, errors.StatusError, errors.ProtocolError}
    drawn = ast.get_docstring(ast.parse(inspect.getsource(errors))) or ""
    assert {kind.__name__ for kind in classes if kind.__name__ in drawn} == {c.__name__ for c in classes}


GENERAL = {
    "INVALID_PARAMETER": "InvalidRequest",
    "UNAUTHENTICATED": "AccessDenied",
    "CANCELLED": "Cancelled",
    "DEADLINE_EXCEEDED": "DeadlineExceeded",
    "INTERNAL": "ServerError",
}
"""Reasons that say no more than their codes; all others have a class under the server's name for it."""


def server_errors() -> dict[str, tuple[type[Exception], grpc.StatusCode]]:
    """What the server can answer: its error and the status code, by reason."""
    status = pytest.importorskip("chromarpc_server.transport.messages.errors")
    return {kind.reason: (kind, code) for kind, code in status.CODES.items()}


def test_every_reason_of_the_server_has_a_class_of_its_own() -> None:
    found = {reason: error_type(code, reason).__name__ for reason, (_, code) in server_errors().items()}
    assert found == {reason: GENERAL.get(reason, kind.__name__) for reason, (kind, _) in server_errors().items()}
    assert set(REASON_ERRORS) == set(found)


def test_every_reason_of_the_contract_has_a_class() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in codes_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert set(REASON_ERRORS) == reasons - {"UNSPECIFIED"}


def test_every_reason_of_the_server_has_its_class_in_typescript() -> None:
    source = (Path(__file__).parents[2] / "client" / "typescript" / "src" / "errors.ts").read_text("utf-8")
    table = source[source.index("const BY_REASON") :].partition("};")[0]
    found = dict(re.findall(r"^  ([A-Z_]+): (\w+),$", table, re.MULTILINE))
    assert found == {reason: GENERAL.get(reason, kind.__name__) for reason, (kind, _) in server_errors().items()}
    assert all(f" {name} " in source.partition("*/")[0] for name in found.values())


def test_an_error_with_a_reason_was_answered_by_a_server_that_was_reached() -> None:
    status = detailed_status(grpc.StatusCode.UNAVAILABLE, "out of room", reason="STORE_UNAVAILABLE")
    assert (
        from_status(grpc.StatusCode.UNAVAILABLE, "out of room", trailing(status), target="t").message
        == "out of room"
    )
    newer = detailed_status(grpc.StatusCode.UNAVAILABLE, "busy", reason="OF_A_NEWER_SERVER")
    assert from_status(grpc.StatusCode.UNAVAILABLE, "busy", trailing(newer), target="t").message == "busy"


def test_every_error_that_the_package_knows_can_be_imported_from_it() -> None:
    names = {kind.__name__ for kind in (*CODE_ERRORS.values(), *REASON_ERRORS.values())}
    assert names <= set(chromarpc.__all__)


def test_a_reason_that_contradicts_its_code_narrows_nothing() -> None:
    assert error_type(grpc.StatusCode.INTERNAL, "QUEUE_FULL") is errors.ServerError


def test_details_are_read() -> None:
    status = detailed_status(
        grpc.StatusCode.INVALID_ARGUMENT,
        "invalid request",
        reason="INVALID_PARAMETER",
        metadata={"more": "1"},
        violations={"prompts.0.width": "must be between 64 and 4096, got 63"},
        retry_after_s=2.5,
    )
    error = from_status(grpc.StatusCode.INVALID_ARGUMENT, "invalid request", trailing(status), target="t")
    assert type(error) is errors.InvalidRequest
    assert str(error) == "invalid request"
    assert error.reason == "INVALID_PARAMETER"
    assert error.metadata == {"more": "1"}
    assert [violation.field for violation in error.violations] == ["prompts.0.width"]
    assert error.retry_after_s == 2.5


def test_another_domain_is_not_ours_to_interpret() -> None:
    status = detailed_status(grpc.StatusCode.UNAVAILABLE, "x", reason="DRAINING", domain="proxy.example")
    error = from_status(grpc.StatusCode.UNAVAILABLE, "x", trailing(status), target="t")
    assert type(error) is errors.ServerUnavailable
    assert error.reason == ""


def malformed() -> dict[str, tuple[tuple[str, str | bytes], ...]]:
    broken = detailed_status(grpc.StatusCode.INTERNAL, "m", reason="DEVICE_LOST")
    broken.details[0].value = b"\xff\xff\xff"
    foreign = status_pb2.Status(details=[any_pb2.Any(type_url="type.example/None", value=b"x")])
    return {
        "not a status": ((KEY, b"\xff\xff\xff\xff"),),
        "a status whose detail is broken": trailing(broken),
        "a detail of unknown type": trailing(foreign),
        "text where bytes belong": ((KEY, "text"),),
        "empty": ((KEY, b""),),
    }


@pytest.mark.parametrize("metadata", malformed().values(), ids=malformed().keys())
def test_malformed_details_never_hide_the_error(metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    error = from_status(grpc.StatusCode.INTERNAL, "boom", metadata, target="t")
    assert type(error) is errors.ServerError
    assert error.message == "boom"


def test_an_unreachable_server_is_named() -> None:
    error = from_status(grpc.StatusCode.UNAVAILABLE, "refused", None, target="gpu.example:50051")
    assert "gpu.example:50051" in str(error)


def test_errors_are_caught_by_their_family() -> None:
    for kind in CODE_ERRORS.values():
        assert issubclass(kind, StatusError)
    assert not issubclass(errors.ProtocolError, StatusError)
