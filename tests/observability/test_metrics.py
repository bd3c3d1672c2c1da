"""Metrics through a real server: what ran is counted, nothing a client chose becomes a label."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import chromarpc
from chromarpc_server.observability.metrics import size_label
from chromarpc_server.settings import ServerSettings
from tests.conftest import RunningServer

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}
Serve = Callable[..., RunningServer]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def get(server: RunningServer, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{server.app.metrics_port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def look(server: RunningServer) -> Samples:
    status, text = get(server, "/metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """The sum over every sample that has these labels."""
    return sum(found for (sample, has), found in samples.items() if sample == name and set(labels.items()) <= has)


def test_the_preview_profiles_own_parts_are_told_and_are_the_models(serve: Serve) -> None:
    server = serve(metrics_port=0)

    def told(what: str) -> float:
        return value(look(server), "chromarpc_resident_bytes", what=what, model="chroma-mini")

    with chromarpc.Client(server.target) as client:
        client.generate_images("a", **SMALL)
        before = told("checkpoint") - told("prepared_sets")
        assert told("trainer_parts") == 0
        client.generate_images("a", **SMALL, profile="preview")
        assert told("trainer_parts") > 0
        assert told("checkpoint") - told("prepared_sets") - told("trainer_parts") == before
        (model,) = (model for model in client.list_models() if model.id == "chroma-mini")
        assert model.resident_bytes == told("checkpoint")


def test_what_ran_is_counted(serve: Serve) -> None:
    server = serve(metrics_port=0)
    with chromarpc.Client(server.target) as client:
        client.generate_images("a", **SMALL)
        client.generate_images("a", **SMALL)
        with pytest.raises(chromarpc.InvalidRequest):
            list(client.generate("a", model="chroma-mini", width=1))
        running = client.generate("a", **LONG)
        assert any(isinstance(event, chromarpc.Step) for event in running)
        during = look(server)
        assert value(during, "chromarpc_running_jobs") == 1
        assert value(during, "chromarpc_calls_in_progress", method="/chromarpc.v1.GenerationService/Generate") == 1
        running.cancel()
        client.generate_images("a", **SMALL)
        found = look(server)
    served = {"model": "chroma-mini", "profile": "reference"}
    assert value(found, "chromarpc_jobs_total", outcome="succeeded", **served) == 3
    assert value(found, "chromarpc_jobs_total", outcome="cancelled", reason="CANCELLED", **served) == 1
    assert value(found, "chromarpc_job_seconds_count", **served) == 3
    assert value(found, "chromarpc_queue_wait_seconds_count", model="chroma-mini") == 4
    assert value(found, "chromarpc_step_seconds_count", size="256", **served) >= 7
    assert value(found, "chromarpc_stage_seconds_count", stage="denoising", **served) == 3
    assert value(found, "chromarpc_images_total", media_type="image/png") == 3
    assert value(found, "chromarpc_image_bytes_total") > 0
    assert value(found, "chromarpc_weights_total", source="built") == 1
    assert value(found, "chromarpc_weights_total", source="resident") == 3
    assert value(found, "chromarpc_prepared_sets_total", event="hit") == 3
    assert value(found, "chromarpc_resident_bytes", what="checkpoint", model="chroma-mini") > 0
    assert value(found, "chromarpc_resident_bytes", what="trainer_parts", model="chroma-mini") == 0
    assert value(found, "chromarpc_device_memory_bytes", state="used") > 10 * 2**20
    assert value(found, "chromarpc_device_memory_bytes", state="total") > value(
        found, "chromarpc_device_memory_bytes", state="used"
    )
    assert value(found, "chromarpc_event_lag_seconds_count") >= 3 * 6
    assert value(found, "chromarpc_ready") == 1
    assert value(found, "chromarpc_info") == 1
    calls = {"method": "/chromarpc.v1.GenerationService/Generate"}
    assert value(found, "chromarpc_calls_total", code="OK", **calls) == 3
    assert value(found, "chromarpc_calls_total", code="INVALID_ARGUMENT", **calls) == 1
    assert value(found, "chromarpc_calls_total", code="CANCELLED", **calls) == 1
    assert value(found, "process_resident_memory_bytes") > 0


def test_nothing_that_a_client_chose_becomes_a_label(serve: Serve) -> None:
    server = serve(metrics_port=0)
    with chromarpc.Client(server.target) as client:

        def use(word: str) -> None:
            for index in range(3):
                with pytest.raises(chromarpc.ModelNotFound):
                    list(client.generate("a", model=f"planted-{word}-{index}"))
                with pytest.raises(chromarpc.LoraNotFound):
                    list(client.generate("a", loras=[f"planted-{word}-{index}"], **SMALL))
                client.generate_images(f"planted {word} {index}", seed=index, **SMALL)

        use("one")
        before = set(look(server))
        use("two")
        after = set(look(server))
    assert after == before
    assert not any("planted" in f"{name}{labels}" for name, labels in after)


def test_probes_over_http(serve: Serve) -> None:
    server = serve(metrics_port=0, grace_s=60)
    assert get(server, "/livez") == (200, "yes\n")
    assert get(server, "/readyz") == (200, "yes\n")
    assert get(server, "/")[0] == 404
    with chromarpc.Client(server.target) as client, client.generate("a", **LONG) as events:
        assert any(isinstance(event, chromarpc.Step) for event in events)
        server.loop.call_soon_threadsafe(server.app.stop)
        while get(server, "/readyz")[0] == 200:
            pass
        # Draining: not ready, and no reason to be killed.
        assert get(server, "/livez") == (200, "yes\n")
        assert value(look(server), "chromarpc_ready") == 0
    assert server.stop() == 0
    with pytest.raises(OSError, match="refused"):
        get(server, "/livez")


def test_a_silent_connection_keeps_nobody_waiting(serve: Serve) -> None:
    server = serve(metrics_port=0)
    assert server.app.metrics_port is not None
    silent = [socket.create_connection(("127.0.0.1", server.app.metrics_port)) for _ in range(10)]
    try:
        assert get(server, "/readyz")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", server.app.metrics_port, timeout=10)
        connection.request("POST", "/metrics", body=b"x" * 1000)
        assert connection.getresponse().status == 501
        connection.close()
    finally:
        for connection_ in silent:
            connection_.close()


def test_no_port_is_open_unless_asked_for(server: RunningServer) -> None:
    assert server.app.metrics_port is None
    assert ServerSettings(metrics_port=9090).metrics_host == "127.0.0.1"


@pytest.mark.parametrize(
    ("pixels", "label"), [(1, "256"), (256**2, "256"), (256**2 + 1, "512"), (1024**2, "1024"), (4096**2, "larger")]
)
def test_sizes_have_few_labels(pixels: int, label: str) -> None:
    assert size_label(pixels) == label
