"""Every test here starts Ray, which takes seconds and memory: one cluster for a module, mended between tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import chromarpc
from tests.faults.processes import server_process
from tests.ray.cluster import RayCluster, ray_cluster
from tests.ray.server import RayServer

SMALL: dict[str, Any] = {"model": "chroma-mini", "width": 256, "height": 256, "seed": 3}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[RayCluster]:
    with ray_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: RayCluster) -> RayCluster:
    """A head, and two hosts of one CPU each."""
    running_cluster.mend()
    return running_cluster


@pytest.fixture
def start(tiny_checkpoint: Path, tmp_path: Path, cluster: RayCluster) -> Iterator[Callable[..., RayServer]]:
    """Starts servers over the cluster, which are gone in the end."""
    servers: list[RayServer] = []

    def begin(devices: str = "ray", *flags: str, **options: Any) -> RayServer:
        servers.append(RayServer(tiny_checkpoint, tmp_path, cluster.address, devices, *flags, **options))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """SHA-256 of the image that a thread of the server draws in so many steps."""
    known: dict[int, str] = {}

    def sha256(steps: int) -> str:
        if steps not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            with (
                server_process(tiny_checkpoint, folder, "--store", "memory", threads=1) as server,
                chromarpc.Client(server.target) as client,
            ):
                known[steps] = client.generate_images("a fox", sample_steps=steps, **SMALL)[0].sha256
        return known[steps]

    return sha256
