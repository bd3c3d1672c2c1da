"""A cluster that works: what reaches Ray, who may join, and how many there are."""

from __future__ import annotations

import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import chromarpc
from tests.ray.cluster import RayCluster, until
from tests.ray.conftest import SMALL
from tests.ray.network import Network
from tests.ray.server import RayServer
from tests.ray.test_failures import STEPS, Start, Undisturbed, Watched
from tests.tiny_checkpoint import GOLDENS


def test_neither_prompts_nor_tokens_reach_rays_files(
    start: Start, cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do they when a job fails in a way that nobody foresaw."""
    loras = tmp_path / "loras"
    loras.mkdir()
    shutil.copyfile(GOLDENS / "adapters" / "aitk.safetensors", loras / "secret-name.safetensors")
    callers = tmp_path / "callers.toml"
    token, entry = _token()
    monkeypatch.setenv("FAULT", "tokens")
    monkeypatch.setenv("TOKENS", str(tmp_path / "tokens"))
    callers.write_text(entry)
    prompt, negative = f"prompt {secrets.token_hex(8)}", f"negative {secrets.token_hex(8)}"
    server = start(
        "ray", "--callers", str(callers), "--lora-root", str(loras), module="tests.ray.faulty_server", token=token
    )
    server.await_devices(2)
    for _ in range(2):
        server.client.generate_images(
            prompt, sample_steps=4, loras=["secret-name.safetensors"], **{**SMALL, "width": 64, "height": 64}
        )
    job = Watched(server, prompt=negative)
    cluster.host_of(server.pid(job.device)).kill()
    job.until_restarted()
    list(job.stream)
    assert server.stop() == 0
    assert cluster.holds("DeviceActor")  # what Ray has of us is there to be found
    invitations = (tmp_path / "tokens").read_text().split()
    assert len(invitations) >= 2
    for secret in (prompt, negative, token, "secret-name", *invitations):
        assert cluster.holds(secret) == []
        assert secret not in server.log


def _token() -> tuple[str, str]:
    from chromarpc_server.transport.access.callers_file import entry_text, new_token

    token = new_token()
    return token, entry_text("me", token)


def test_an_actor_of_another_version_is_refused_and_the_difference_named(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULT", "versions")
    server = start(module="tests.ray.faulty_server")
    until(lambda: "actor.refused" in server.log, "it is refused", told=lambda: server.log)
    assert "instead of 9.9.9" in server.log
    assert "torch" in server.log
    assert server.devices() == {}
    assert server.client.health() is not chromarpc.HealthStatus.SERVING
    assert server.stop() == 0


def test_a_partition_whose_old_actor_goes_on_changes_nothing(
    start: Start, cluster: RayCluster, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    network = Network(("127.0.0.1", port))
    monkeypatch.setenv("FAULT", "network")
    monkeypatch.setenv("THROUGH", network.address)
    server = start("ray:1", "--ray.host", "127.0.0.1", "--ray.port", str(port), module="tests.ray.faulty_server")
    server.await_devices(1)
    job = Watched(server)
    old = server.pid(job.device)
    network.cut()
    job.until_restarted()
    network.mend()
    job.require_picture(undisturbed(STEPS))
    until(lambda: not Path(f"/proc/{old}").exists(), "the old actor ended")
    network.close()


def test_the_number_of_devices_follows_the_queue(start: Start, cluster: RayCluster) -> None:
    server = start("ray:0-2", "--ray.idle-s", "2")
    server.await_health(serving=True)  # although there is no device yet
    assert server.devices() == {}
    jobs = [server.client.create_job("a fox", sample_steps=STEPS, **SMALL).job_id for _ in range(3)]
    server.await_devices(2)
    for job in jobs:
        assert isinstance(list(server.client.watch_job(job))[-1], chromarpc.Completed)
    server.await_devices(0)
    assert "device.returned" in server.log
    assert "device.out" not in server.log
    assert server.client.health() is chromarpc.HealthStatus.SERVING


def test_a_cluster_of_its_own_is_gone_with_the_server(
    tiny_checkpoint: Path, tmp_path: Path, undisturbed: Callable[[int], str]
) -> None:
    server = RayServer(tiny_checkpoint, tmp_path, "local", "ray:1")
    try:
        server.await_devices(1)
        assert server.client.generate_images("a fox", sample_steps=20, **SMALL)[0].sha256 == undisturbed(20)
        pid = server.pid("ray:0")
        assert server.stop() == 0
        until(lambda: not Path(f"/proc/{pid}").exists(), "its actor ended")
    finally:
        server.close()
