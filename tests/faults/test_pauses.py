"""A process that is stopped for a while, as SIGSTOP and a paused virtual machine do it, and goes on."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

import chromarpc
from chromarpc.request import build_request
from chromarpc.v1 import generation_service_pb2_grpc
from tests.faults.processes import server_process, until_step

LONG: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "sample_steps": 150}
REQUEST_ID = "3e0a3c0e-26a4-4d0f-9b52-7b8e2f5d8f11"
PAUSE_S = 5.0
"""Longer than any of the times below."""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system has no SIGSTOP")
def test_a_paused_process_neither_takes_its_device_for_hung_nor_gives_up_a_caller(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    flags = ("--step-timeout-s", "3", "--reattach-s", "3")
    with server_process(tiny_checkpoint, tmp_path, *flags) as server:
        with grpc.insecure_channel(
            server.target
        ) as channel:  # the client of this project would say that it leaves
            request = build_request("a", **LONG, request_id=REQUEST_ID)
            running = generation_service_pb2_grpc.GenerationServiceStub(channel).Generate(request)
            assert any(answer.event.HasField("step") for answer in running)
        while "job.caller_away" not in server.log:
            assert server.process.poll() is None
        server.process.send_signal(signal.SIGSTOP)
        threading.Event().wait(PAUSE_S)
        server.process.send_signal(signal.SIGCONT)
        with (
            chromarpc.Client(server.target) as client,
            client.generate("a", **LONG, request_id=REQUEST_ID) as again,
        ):
            until_step(again)
            # The same job went on: one that was given up would have been made anew.
            assert server.log.count("job.accepted") == 1
            assert "job.cancelled" not in server.log
        assert "process.paused" in server.log
        assert "device.hung" not in server.log
        assert server.stop() == 0
