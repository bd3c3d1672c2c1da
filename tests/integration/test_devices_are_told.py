"""A real server with two devices, one of which is lost: what callers, operators and their tools are told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import chromarpc
from chromarpc.cli import inquiry
from chromarpc.pictures.files import RECORD_KEY, read_picture
from chromarpc.pictures.recorded import recorded_facts
from chromarpc.v1 import model_service_pb2
from chromarpc_server.domain.errors import DeviceLost
from chromarpc_server.observability.logs import JsonFormatter
from tests.conftest import RunningServer
from tests.integration.test_device_errors import _fail_once
from tests.observability.test_metrics import get, look, value

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 64, "height": 64, "sample_steps": 2}
IDLE, LOST = model_service_pb2.DEVICE_STATE_IDLE, model_service_pb2.DEVICE_STATE_LOST


class Lines(logging.Handler):
    """Keeps log lines as machines get them, formatted on the thread that logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(JsonFormatter().format(record)))


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    caplog.set_level(logging.INFO, logger="chromarpc_server")
    kept, logger = Lines(), logging.getLogger("chromarpc_server")
    logger.addHandler(kept)
    yield kept.lines
    logger.removeHandler(kept)


def test_two_devices_are_told_by_name(serve: Callable[..., RunningServer]) -> None:
    server = serve(devices="cpu,cpu", metrics_port=0, preload=["chroma-mini"])
    with chromarpc.Client(server.target) as client:
        (prepared,) = (event for event in client.generate("a", **SMALL) if isinstance(event, chromarpc.Prepared))
        info = client.server_info()
        (model,) = (one for one in client.list_models() if one.id == "chroma-mini")
    (drew,) = (one for one in info.devices if one.job_count)
    assert (prepared.device_id, prepared.second_device, prepared.device) == (drew.id, "", drew.name)
    assert [(one.id, one.state) for one in info.devices] == [("cpu:0", IDLE), ("cpu:1", IDLE)]
    assert info.device == info.devices[0]
    assert sum(one.job_count for one in info.devices) == 1
    assert all("reference" in one.profiles for one in info.devices)
    assert [one.device_id for one in model.residences] == ["cpu:0", "cpu:1"]
    assert model.resident_bytes == sum(one.resident_bytes for one in model.residences)
    assert {held.device_id for held in model.resident_sets} == {"cpu:0", "cpu:1"}
    found = look(server)
    assert value(found, "chromarpc_devices", state="idle") == 2
    assert value(found, "chromarpc_device_jobs_total") == 1
    for device in ("cpu:0", "cpu:1"):
        assert value(found, "chromarpc_resident_bytes", what="checkpoint", device=device) > 0


def test_a_lost_device_is_told_everywhere_and_the_server_stays_ready(
    serve: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch, log_lines: list[dict[str, Any]]
) -> None:
    server = serve(devices="cpu,cpu", metrics_port=0)
    _fail_once(monkeypatch, DeviceLost("the device failed and cannot be used any more"))
    with chromarpc.Client(server.target) as client:
        events = list(client.generate("a", **SMALL))
        info = client.server_info()
        (model,) = (one for one in client.list_models() if one.id == "chroma-mini")
        lines = list(inquiry._info_lines(info))
    (restarted,) = (event for event in events if isinstance(event, chromarpc.Restarted))
    (lost,) = (one for one in info.devices if one.state == LOST)
    (left,) = (one for one in info.devices if one.state == IDLE)
    assert (restarted.moved_from, restarted.bits_may_differ) == (lost.id, False)
    assert lost.lost_because == "the device failed and cannot be used any more"
    assert [one.device_id for one in model.residences] == [left.id]
    assert f"lost, {lost.lost_because}" in "\n".join(lines)
    assert info.unavailable_because == ""
    assert get(server, "/readyz") == (200, "yes\n")
    found = look(server)
    assert (value(found, "chromarpc_devices", state="lost"), value(found, "chromarpc_ready")) == (1, 1)
    assert value(found, "chromarpc_job_moves_total", device=lost.id) == 1
    assert value(found, "chromarpc_job_restarts_total") == 0
    assert value(found, "chromarpc_jobs_total", outcome="succeeded") == 1
    said = [(line["event"], line.get("device")) for line in log_lines]
    assert [("job.begun", lost.id), ("device.out", lost.id), ("job.moved", lost.id), ("job.begun", left.id)] == [
        line for line in said if line[0] in ("job.begun", "device.out", "job.moved")
    ]
    assert ("job.completed", left.id) in said
    # What a device's own thread logs says which one it is without being told.
    assert [device for event, device in said if event == "checkpoint.loaded"] == [lost.id, left.id]


def test_a_pair_is_one_device_and_pictures_say_that_two_drew_them(serve: Callable[..., RunningServer]) -> None:
    server = serve(devices="cpu,cpu", cfg_parallel=True)
    with chromarpc.Client(server.target) as client:
        events = list(client.generate("a", **SMALL))
        (pair,) = client.server_info().devices
    (prepared,) = (event for event in events if isinstance(event, chromarpc.Prepared))
    (ready,) = (event for event in events if isinstance(event, chromarpc.ImageReady))
    assert pair.id == "cpu:0+cpu:1"
    assert pair.second
    assert (prepared.device_id, prepared.second_device) == (pair.id, pair.second)
    assert recorded_facts(read_picture(ready.image.data).texts[RECORD_KEY]).facts["guidance_on_two_devices"].value


def test_the_reason_of_a_server_without_a_device_is_told_by_its_probe(
    serve: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(devices="cpu,cpu", metrics_port=0)
    engine: Any = server.app._engine
    monkeypatch.setattr(type(engine), "is_available", False)
    monkeypatch.setattr(engine, "missing_devices", lambda: "the cluster has no GPU now")
    server.loop.call_soon_threadsafe(server.app._set_available, False)
    while get(server, "/readyz")[0] == 200:
        pass
    assert get(server, "/readyz") == (503, "no: the cluster has no GPU now\n")
    assert get(server, "/livez") == (200, "yes\n")
    with chromarpc.Client(server.target) as client:
        assert client.health() is chromarpc.HealthStatus.NOT_SERVING
        assert client.server_info().unavailable_because == "the cluster has no GPU now"
