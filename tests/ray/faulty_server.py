"""The server as it is shipped, with one fault planted in what it tells its actors.

Run as `FAULT=name python -m tests.ray.faulty_server` with the server's own flags.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from chromarpc_server.__main__ import main
from chromarpc_server.cluster import ray_devices
from chromarpc_server.cluster.invitation import Invitation
from chromarpc_server.cluster.placement import RayPlacement


def _other_versions() -> None:
    real = ray_devices.own_versions()
    ray_devices.own_versions = lambda: {**real, "torch": "9.9.9"}  # type: ignore[assignment]


def _through_network() -> None:
    """Actors reach the server at another address, where the test has a network between."""
    real = RayPlacement.start_actor

    def start_actor(self: RayPlacement, invitation: Invitation) -> None:
        host, _, port = os.environ["THROUGH"].rpartition(":")
        real(self, replace(invitation, host=host, port=int(port)))

    RayPlacement.start_actor = start_actor  # type: ignore[method-assign]


def _noted_tokens() -> None:
    """No fault: what actors are told is noted, so that a test knows what to look for."""
    real = RayPlacement.start_actor

    def start_actor(self: RayPlacement, invitation: Invitation) -> None:
        with Path(os.environ["TOKENS"]).open("a") as file:
            file.write(invitation.token + "\n")
        real(self, invitation)

    RayPlacement.start_actor = start_actor  # type: ignore[method-assign]


FAULTS: Mapping[str, Callable[[], None]] = {
    "versions": _other_versions,
    "network": _through_network,
    "tokens": _noted_tokens,
}


if __name__ == "__main__":
    FAULTS[os.environ["FAULT"]]()
    main()
