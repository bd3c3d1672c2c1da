"""The devices of this host: a thread of this process for each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from chromarpc_server.domain.errors import DeviceError
from chromarpc_server.domain.limits import Budgets, DeviceTimeouts
from chromarpc_server.pipeline import PROFILES, DeviceChoice
from chromarpc_server.runtime.device import Device
from chromarpc_server.runtime.device_thread import DeviceThread
from chromarpc_server.runtime.host_share import HostShare
from chromarpc_server.runtime.running_time import RunningTime

log = logging.getLogger(__name__)


class LocalDevices:
    """Those that the settings name. One that is lost stays out until the process is started again."""

    waits_for_more = False

    def __init__(
        self,
        choices: Sequence[DeviceChoice],
        running_time: RunningTime,
        budgets: Budgets | None = None,
        timeouts: DeviceTimeouts | None = None,
    ) -> None:
        """Opens nothing.

        Args:
            choices: one or more devices.
            running_time: of the event loop that gives them work.
            budgets: how much may be resident on each, and on the host for all.
            timeouts: how long each thing may take before a device is taken to hang.
        """
        self._choices = tuple(choices)
        share = HostShare.within(budgets or Budgets())
        self._devices = [DeviceThread(choice, running_time, budgets, timeouts, share) for choice in choices]

    @property
    def profiles(self) -> tuple[str, ...]:
        """Numerics profiles that one of them can compute."""
        return tuple(name for name in PROFILES if any(name in choice.profiles for choice in self._choices))

    async def open(self, join: Callable[[Device], None]) -> None:
        """Opens all of them, and gives them to `join` in the order named.

        Raises:
            ChromaError: one cannot be used.
        """
        try:
            opened = await asyncio.gather(*(device.open() for device in self._devices))
        except BaseException:
            for device in self._devices:
                device.close()
            raise
        for device, description in zip(self._devices, opened, strict=True):
            log.info("device.opened", extra={"device": description.id, "device_name": description.name})
            join(device)

    def missing(self) -> str:
        """Where all are lost."""
        return "every device of this host is lost"

    def refuse(self, device: Device, error: DeviceError) -> None:
        """Does not happen: nothing joins later."""

    def close(self) -> None:
        """Nothing joins later."""
