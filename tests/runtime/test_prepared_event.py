"""What the `prepared` event says of the model's files."""

from __future__ import annotations

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.events import Prepared, WeightsReport, WeightsSource
from chromarpc_server.domain.requests import GenerationRequest, PromptRequest
from chromarpc_server.domain.resolve import Serving, resolve
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.runtime.prepared_event import prepared_event

PLAN = resolve(GenerationRequest(model="chroma-mini", prompts=(PromptRequest("a fox"),)), Serving())


def _prepared(left_out: str) -> Prepared:
    return prepared_event(
        PLAN,
        (),
        (),
        (),
        model_revision="0" * 64,
        stored_as="bf16",
        versions={},
        device=DeviceDescription("cpu", "a processor", 0, "float32"),
        weights=WeightsReport(WeightsSource.BUILT, 5, 1.5, 1, 1000),
        left_out=left_out,
    )


def test_a_job_is_told_what_of_the_models_files_was_left_out() -> None:
    (warning,) = _prepared("the decoder's 12 tensors").warnings
    assert warning.code is WarningCode.BASE_PARTS_DROPPED
    assert "the decoder's 12 tensors" in warning.message


def test_nothing_is_said_where_nothing_was_left_out() -> None:
    assert _prepared("").warnings == ()
