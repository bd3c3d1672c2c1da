"""Errors as the HTTP API answers them: in the reference's shape, and by its codes where it has its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

from chromarpc.v1 import generation_service_pb2
from chromarpc_server.domain.error_table import BY_REASON, HttpErrorCode
from chromarpc_server.domain.errors import ChromaError, FieldViolation, InvalidParameter, first_named

STATUS_HEADER: Final = "chromarpc-http-status"
"""Names an answer's HTTP status to the gateway."""
MAX_VIOLATIONS: Final = 100
"""How many an answer lists; the rest is a count."""
_UNKNOWN_STATUS: Final = 500
_TRANSFORMER: Final = re.compile(r"loras\.\d+\.transformer")


class HttpError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: Mapping[str, object],
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: ChromaError) -> Self:
        """An error by its own reason."""
        details: dict[str, object] = dict(error.metadata)
        if error.violations:
            details["violations"] = listed(error.violations)
        status = BY_REASON[error.reason].http_status
        return cls(status, error.reason, error.message, details, error.retry_after_s)

    @classmethod
    def by(cls, code: HttpErrorCode, message: str, details: Mapping[str, object] | None = None) -> Self:
        """An error by a code that only HTTP has."""
        return cls(code.http_status, code, message, details or {})

    def body(self) -> bytes:
        """The JSON."""
        error = {"code": self.code, "message": self.message, "details": self.details}
        return json.dumps({"detail": {"error": error}}, ensure_ascii=False).encode()

    def headers(self) -> tuple[tuple[str, str], ...]:
        """What the gateway makes status and headers of."""
        headers: tuple[tuple[str, str], ...] = ((STATUS_HEADER, str(self.status)),)
        if self.retry_after_s is not None:
            headers += (("retry-after", str(max(1, round(self.retry_after_s)))),)
        return headers


def http_status(reason: str) -> int:
    """The HTTP status of an error's reason."""
    entry = BY_REASON.get(reason)
    return _UNKNOWN_STATUS if entry is None else entry.http_status


def listed(violations: Iterable[Any]) -> list[dict[str, str]]:
    """Violations of an error or of a message, as JSON has them."""
    shown = [{"field": violation.field, "description": violation.description} for violation in violations]
    rest = len(shown) - MAX_VIOLATIONS
    return [*shown[:MAX_VIOLATIONS], {"field": "", "description": f"and {rest} more"}] if rest > 0 else shown


def malformed(message: str, violations: list[FieldViolation]) -> HttpError:
    """A body with values of the wrong types, or none at all; `message` where there is one violation."""
    if len(violations) != 1:
        message = f"invalid request: {first_named([violation.field for violation in violations])}"
    return HttpError.of(InvalidParameter(message, violations=violations))


def submission_error(error: ChromaError, request: generation_service_pb2.GenerateRequest) -> HttpError:
    """Why a request cannot be queued, with the reference's own details."""
    found = HttpError.of(error)
    if found.code == "MODEL_NOT_FOUND":
        models = error.metadata.get("models", "").split(",")
        return HttpError(found.status, found.code, found.message, {"supported_models": models})
    fields = [violation["field"] for violation in listed(error.violations)]
    if found.code == "LORA_NOT_FOUND":
        index = next((int(part) for field in fields for part in field.split(".") if part.isdecimal()), 0)
        path = request.loras[index].path if index < len(request.loras) else ""
        return HttpError(found.status, found.code, found.message, {"lora_path": path})
    if fields and all(map(_TRANSFORMER.fullmatch, fields)):
        named = [lora.transformer for lora in request.loras if lora.HasField("transformer")]
        if all(name in ("low", "high") for name in named):
            return HttpError.by(HttpErrorCode.MOE_FORMAT_NOT_SUPPORTED, found.message, found.details)
    return found


def request_error(error: ChromaError, request_id: str) -> HttpError:
    """Why a job, which the reference calls a request, is not found; also for an id that can be no job's."""
    found = HttpError.of(error)
    if found.status not in (404, 422):
        return found
    return HttpError.by(HttpErrorCode.REQUEST_NOT_FOUND, found.message, {"request_id": request_id[:100]})
