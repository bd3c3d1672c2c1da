"""What the command says of a server's devices, of jobs that move, and of pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chromarpc.v1 import model_service_pb2
from tests.client.client_fake_server import JobEvent, Request, Story, png
from tests.client.shell import Shell


def test_info_of_several_devices_says_what_each_does(shell: Shell) -> None:
    busy = model_service_pb2.Device(
        id="cuda:0+cuda:1",
        name="NVIDIA H100",
        memory_bytes=80 * 10**9,
        dtype="bfloat16",
        state=model_service_pb2.DEVICE_STATE_BUSY,
        second="cuda:1",
        job_count=7,
        fallbacks=[model_service_pb2.DeviceFallback(without="kernels", message="it does without kernels")],
    )
    busy.busy_time.FromSeconds(62)
    lost = model_service_pb2.Device(
        id="cuda:2",
        name="NVIDIA L40S",
        host="gpu-7",
        memory_bytes=48 * 10**9,
        dtype="bfloat16",
        state=model_service_pb2.DEVICE_STATE_LOST,
        job_count=1,
        lost_because="the device does not answer",
    )
    idle = model_service_pb2.Device(
        id="cuda:3", name="NVIDIA L40S", dtype="bfloat16", state=model_service_pb2.DEVICE_STATE_IDLE
    )
    shell.server.devices = [busy, lost, idle]
    lines = shell("info").stdout.splitlines()
    at = lines.index("devices    3")
    assert lines[at + 1 : at + 5] == [
        "  cuda:0+cuda:1 (NVIDIA H100, 80.0 GB, bfloat16): busy, 7 jobs in 1:02 min",
        "    it does without kernels",
        "  cuda:2 (NVIDIA L40S on gpu-7, 48.0 GB, bfloat16): lost, the device does not answer",
        "  cuda:3 (NVIDIA L40S, 0 bytes, bfloat16): idle",
    ]
    assert not any(line.startswith("device ") for line in lines)
    told = json.loads(shell("info", "--json").stdout)["devices"]
    assert [(one["id"], one["state"]) for one in told] == [
        ("cuda:0+cuda:1", "DEVICE_STATE_BUSY"),
        ("cuda:2", "DEVICE_STATE_LOST"),
        ("cuda:3", "DEVICE_STATE_IDLE"),
    ]
    assert "in memory (16.8 MB) of cuda:0+cuda:1, cuda:2, cuda:3" in shell("models").stdout


def test_info_of_one_device_is_what_it_was(shell: Shell) -> None:
    shell.server.devices[0].state = model_service_pb2.DEVICE_STATE_IDLE
    assert "device     cpu (a CPU, 1.1 GB, float32)" in shell("info").stdout.splitlines()


def test_info_without_a_device_says_why(shell: Shell) -> None:
    shell.server.devices = []
    shell.server.unavailable_because = "the cluster has no GPU now"
    lines = shell("info").stdout.splitlines()
    assert "device     none now, jobs wait: the cluster has no GPU now" in lines
    assert len([line for line in lines if line.startswith("device")]) == 1


@pytest.mark.parametrize(
    ("restarted", "line"),
    [
        ({}, "the server was restarted; attempt 2 begins"),
        ({"moved_from": "cuda:0"}, "device cuda:0 was lost; attempt 2 begins on another one"),
        (
            {"moved_from": "cuda:0", "bits_may_differ": True},
            "device cuda:0 was lost; attempt 2 begins on one of another model, so images may differ a little",
        ),
    ],
)
def test_a_restart_says_why_in_one_line(shell: Shell, restarted: dict[str, Any], line: str) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        story = Story()
        yield story.accepted(request)
        yield story.restarted(2, **restarted)
        yield story.prepared(request)
        yield from story.image(png(1))
        yield story.completed()

    shell.server.script = script
    assert line in shell("generate", "a").stderr.splitlines()


def test_guidance_on_two_devices_is_told_and_recorded(shell: Shell) -> None:
    def script(request: Request, context: Any) -> Iterator[JobEvent]:
        story = Story()
        yield story.accepted(request)
        yield story.prepared(request, device_id="cuda:0+cuda:1", second_device="cuda:1")
        yield from story.image(png(1))
        yield story.completed()

    shell.server.script = script
    said = shell("generate", "a").stderr.splitlines()
    assert "guidance is computed on two devices: cuda:0+cuda:1" in said
    assert "guidance_on_two_devices: true" in shell("explain", "out.png").stdout
    prepared = json.loads(shell("generate", "a", "--events").stdout.splitlines()[1])
    assert (prepared["device_id"], prepared["second_device"]) == ("cuda:0+cuda:1", "cuda:1")
