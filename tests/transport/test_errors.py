"""Every error has its status, and its details stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.rpc import error_details_pb2

from chromarpc_server.domain import errors
from chromarpc_server.domain.error_table import BY_KIND, ENTRIES, ErrorEntry, Retry
from chromarpc_server.domain.errors import ChromaError, DeviceLost, FieldViolation, InvalidParameter, QueueFull
from chromarpc_server.runtime.device import DeviceWithdrawn
from chromarpc_server.transport.messages import errors as status_module
from chromarpc_server.transport.messages.errors import CODES, MAX_DETAILS_BYTES, code_of, rich_status
from chromarpc_server.transport.messages.http_errors import HttpError


def _leaves(kind: type[ChromaError]) -> set[type[ChromaError]]:
    below = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    return {kind} if not below else set().union(*(_leaves(child) for child in below))


def test_the_table_is_total() -> None:
    assert set(CODES) == _leaves(ChromaError)
    assert len({kind.reason for kind in CODES}) == len(CODES)
    for kind in CODES:
        assert kind.__name__ in (errors.__doc__ or "")
        assert kind.reason in (errors.__doc__ or "")


def test_a_finer_kind_of_an_error_has_its_status() -> None:
    error = DeviceWithdrawn("it was given back")
    assert (code_of(error), rich_status(error).code) == (
        code_of(DeviceLost("x")),
        rich_status(DeviceLost("x")).code,
    )
    assert HttpError.of(error).status == HttpError.of(DeviceLost("x")).status


def advised() -> Iterator[str]:
    """Names of the errors that the server raises with the time of a retry."""
    for path in Path(errors.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and any(keyword.arg == "retry_after_s" for keyword in node.keywords):
                yield ast.unparse(node.func).removesuffix(".of")


def test_a_retry_is_advised_only_where_it_may_help() -> None:
    names = set(advised())
    raised = {kind for kind in BY_KIND if kind.__name__ in names}
    assert len(raised) >= 5
    assert [kind for kind in raised if BY_KIND[kind].retry is Retry.NO] == []


STATUS_OVER_HTTP = {
    "INVALID_ARGUMENT": 422,
    "FAILED_PRECONDITION": 400,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "DEADLINE_EXCEEDED": 504,
    "UNAVAILABLE": 503,
    "INTERNAL": 500,
    "CANCELLED": 500,
    "DATA_LOSS": 500,
}
AS_THE_REFERENCE_ANSWERS = {"MODEL_NOT_FOUND": 400, "LORA_NOT_FOUND": 400, "LORA_INVALID": 400}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.reason)
def test_the_http_status_follows_the_code_or_the_reference(entry: ErrorEntry) -> None:
    expected = AS_THE_REFERENCE_ANSWERS.get(entry.reason, STATUS_OVER_HTTP[entry.status])
    assert entry.http_status == expected


def test_ten_thousand_violations_fit_and_are_counted() -> None:
    many = [FieldViolation(f"prompts.{i}.width", "must be between 64 and 4096 " * 20) for i in range(10_000)]
    status = rich_status(InvalidParameter("invalid request", violations=many))
    assert status.ByteSize() <= MAX_DETAILS_BYTES
    request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(request) for detail in status.details)
    assert request.field_violations[0].field == "prompts.0.width"


def test_twenty_short_violations_are_all_named_and_the_rest_counted() -> None:
    many = [FieldViolation(f"prompts.{i}.seed", "is wrong") for i in range(23)]
    status = rich_status(InvalidParameter("invalid request", violations=many))
    request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(request) for detail in status.details)
    assert len(request.field_violations) == 21
    assert request.field_violations[-1].description == "and 3 more"


def test_retry_advice_travels() -> None:
    status = rich_status(QueueFull("full", retry_after_s=2.5))
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToSeconds() == 2


def test_texts_of_four_byte_characters_fit_too() -> None:
    wide = "\U0001d54f" * 1000
    error = InvalidParameter(wide, field="\U0001d54f" * 100, metadata={"one": wide, "two": wide})
    status = rich_status(error)
    assert status.ByteSize() <= MAX_DETAILS_BYTES
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.reason == "INVALID_PARAMETER"
    # gRPC writes a message percent-encoded, in three characters for each of these bytes.
    assert len(status_module.status_message(error).encode()) * 3 <= 1100
    assert status_module.status_message(QueueFull("plain words, 100 %")) == "plain words, 100 %"
