"""A server whose devices are actors of a Ray cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import chromarpc
from tests.faults.processes import ServerProcess
from tests.ray.cluster import until

STEP_TIMEOUT_S = 4.0


class RayServer(ServerProcess):
    """Says where it listens before it has a device; see `await_devices`."""

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        address: str,
        devices: str,
        *flags: str,
        module: str = "chromarpc_server",
        token: str | None = None,
    ) -> None:
        """`address`: the cluster's; `local` for one of its own. `token`: the caller's, where callers are known."""
        super().__init__(
            checkpoint,
            folder / "data",
            *("--devices", devices, "--device", "cpu", "--ray.address", address),
            *("--ray.adapter-folder", str(folder / "hosts")),
            *("--step-timeout-s", str(STEP_TIMEOUT_S), "--job-attempts", "4"),
            *flags,
            module=module,
            threads=1,
        )
        self.client = chromarpc.Client(self.target, token=token)

    def opened(self) -> dict[str, dict[str, str]]:
        """What the log says of each device, when it was last opened, by its id."""
        found = {}
        for line in self.log.splitlines():
            if " device.opened " in line:
                fields = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))
                found[fields["device"]] = fields
        return found

    def devices(self) -> dict[str, Any]:
        """Those that work, by their ids, as the server tells of them."""
        from chromarpc.v1 import model_service_pb2 as messages

        lost = messages.DeviceState.DEVICE_STATE_LOST
        return {device.id: device for device in self.client.server_info().devices if device.state != lost}

    def pid(self, device: str) -> int:
        return int(self.opened()[device]["pid"])

    def await_devices(self, count: int, limit_s: float = 90.0) -> None:
        """Returns once so many work."""
        until(lambda: len(self.devices()) == count, f"{count} devices", limit_s, told=lambda: self.log)

    def await_health(self, *, serving: bool, limit_s: float = 90.0) -> None:
        wanted = chromarpc.HealthStatus.SERVING

        def holds() -> bool:
            return (self.client.health() is wanted) is serving

        until(holds, f"serving={serving}", limit_s, told=lambda: self.log)

    def close(self) -> None:
        self.client.close()
        super().close()
