"""What a device does without is told wherever somebody may look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from prometheus_client.parser import text_string_to_metric_families

import chromarpc
from chromarpc.cli import inquiry
from chromarpc_server.pipeline import pipeline
from tests.conftest import RunningServer
from tests.observability.test_metrics import get

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
MESSAGE = "the device does without the fused kernels, which is slower: a kernel's result is 0.3 off"


class Fallback:
    without = "kernels"
    message = MESSAGE


def _prepared(client: chromarpc.Client) -> chromarpc.Prepared:
    return next(event for event in client.generate("a", **SMALL) if isinstance(event, chromarpc.Prepared))


def _fallbacks(client: chromarpc.Client) -> list[dict[str, str]]:
    device = MessageToDict(client.server_info().device)
    found: list[dict[str, str]] = device.get("fallbacks", [])
    return found


def _gauge(server: RunningServer) -> dict[str, float]:
    _, text = get(server, "/metrics")
    return {
        sample.labels["without"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "chromarpc_device_fallback"
    }


def test_a_fallback_is_told_to_jobs_callers_and_metrics(
    serve: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = [None]
    monkeypatch.setattr(pipeline, "kernels_fallback", lambda _: found[0], raising=False)
    server = serve(metrics_port=0)
    with chromarpc.Client(server.target) as client:
        assert _prepared(client).warnings == ()
        assert _fallbacks(client) == []
        found[0] = Fallback()
        told = _prepared(client).warnings
        assert [(warning.code, warning.field, warning.message) for warning in told] == [
            ("DEVICE_FALLBACK", "", MESSAGE)
        ]
        assert _fallbacks(client) == [{"without": "kernels", "message": MESSAGE}]
        assert any(MESSAGE in line for line in inquiry._info_lines(client.server_info()))
        assert _gauge(server) == {
            "kernels": 1,
            "attention": 0,
            "decoder": 0,
            "step_graphs": 0,
            "encoder_graph": 0,
        }
        found[0] = None
        assert _prepared(client).warnings == ()
        assert _fallbacks(client) == []
        assert _gauge(server)["kernels"] == 0


def test_what_turns_out_while_a_job_runs_is_told_after_it(
    serve: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a step cannot be recorded, which is found out at the second one."""
    found: list[Any] = [None]
    monkeypatch.setattr(pipeline, "kernels_fallback", lambda _: found[0], raising=False)
    real = pipeline.denoise_from

    def denoise_from(*arguments: Any, **keywords: Any) -> Any:
        for step in real(*arguments, **keywords):
            found[0] = Fallback()
            yield step

    monkeypatch.setattr(pipeline, "denoise_from", denoise_from)
    with chromarpc.Client(serve().target) as client:
        list(client.generate("a", **SMALL))
        assert _fallbacks(client) == [{"without": "kernels", "message": MESSAGE}]
