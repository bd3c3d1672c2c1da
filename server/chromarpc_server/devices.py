"""Composition of the devices: which compute, as the settings say."""

from __future__ import annotations

import logging

from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.pipeline import TRAINER_CHOICES, choose_device, choose_devices, idle_gpus
from chromarpc_server.runtime.device import DeviceSource
from chromarpc_server.runtime.local_devices import LocalDevices
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.settings import ServerSettings

log = logging.getLogger(__name__)


def device_source(settings: ServerSettings, running_time: RunningTime) -> DeviceSource:
    """Where jobs are computed.

    Raises:
        WeightsInvalid: a device is not there, or cannot be paired.
    """
    if settings.devices is None:
        choices = [choose_device(settings.device, settings.dtype, threads=settings.threads)]
        idle = idle_gpus(choices) if choices[0].device.type == "cuda" else []
        if idle:
            log.warning("device.idle_ones", extra={"devices": ",".join(idle), "advice": "--devices all"})
    else:
        choices = choose_devices(
            settings.devices.split(","), settings.dtype, threads=settings.threads, in_pairs=settings.cfg_parallel
        )
    return LocalDevices(choices, running_time, settings.budgets(), settings.device_timeouts())


def require_profile(settings: ServerSettings, devices: DeviceSource) -> None:
    """Checks that a device computes the default profile.

    Raises:
        InvalidParameter: none does.
    """
    if settings.profile in devices.profiles:
        return
    is_other_dtype = settings.profile == "preview-exact" and settings.dtype not in TRAINER_CHOICES
    needs = (
        f"computes in bfloat16, as the trainer does, and --dtype says {settings.dtype}"
        if is_other_dtype
        else "needs a GPU of compute capability 8.9 or more"
    )
    raise InvalidParameter(f"the profile {settings.profile} {needs}")
