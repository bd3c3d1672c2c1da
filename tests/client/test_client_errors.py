"""Statuses and their details to exceptions."""

from __future__ import annotations

import ast
import inspect

import grpc
import pytest
from client_fake_server import detailed_status
from google.protobuf import any_pb2
from google.rpc import status_pb2

from chromarpc import errors
from chromarpc.errors import CODE_ERRORS, REASON_ERRORS, StatusError, error_type, from_status

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


def test_reasons_are_those_of_the_server() -> None:
    server_errors = pytest.importorskip("chromarpc_server.domain.errors")
    status = pytest.importorskip("chromarpc_server.transport.status")
    narrowed = set()
    for kind, code in status.CODES.items():
        wanted = error_type(code, kind.reason)
        assert issubclass(wanted, CODE_ERRORS[code])
        if kind.reason in REASON_ERRORS:
            assert wanted.__name__ == kind.__name__
            narrowed.add(kind.reason)
    assert narrowed == set(REASON_ERRORS)
    assert server_errors


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
