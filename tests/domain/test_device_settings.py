"""What `--devices` may say."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from chromarpc_server.device_settings import DeviceNames, RayDevices, RaySettings, ray_devices

NAMES = TypeAdapter(DeviceNames)


@pytest.mark.parametrize(
    "text", ["all", "cpu", "cpu,cpu", "cuda:0,cuda:2", "cuda:1,cpu", "ray", "ray:2", "ray:0-8"]
)
def test_lists_and_clusters_are_taken(text: str) -> None:
    assert NAMES.validate_python(text) == text


@pytest.mark.parametrize("text", ["", "gpu", "all,cpu", "cuda:0,", "ray:0", "ray:3-2", "ray:2-", "ray,cpu"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        NAMES.validate_python(text)


def test_a_cluster_says_how_many_at_least_and_at_most() -> None:
    assert ray_devices("ray") == RayDevices(0, None)
    assert ray_devices("ray:2") == RayDevices(2, 2)
    assert ray_devices("ray:0-8") == RayDevices(0, 8)
    assert ray_devices("cpu,cpu") is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]"])
def test_actors_are_told_an_address_and_not_a_wildcard(host: str) -> None:
    with pytest.raises(ValidationError, match="every address"):
        RaySettings(host=host)
    assert RaySettings(host="10.0.0.7").host == "10.0.0.7"
