"""Composition of the devices: which compute, as the settings say."""

from __future__ import annotations

import logging

from chromarpc_server.cluster.cluster_size import ClusterSize
from chromarpc_server.cluster.messages import HostSettings
from chromarpc_server.cluster.placement import RayPlacement
from chromarpc_server.cluster.ray_devices import ClusterSettings, RayDevices
from chromarpc_server.device_settings import ray_devices
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.models import REGISTRY
from chromarpc_server.pipeline import TRAINER_CHOICES, choose_device, choose_devices, idle_gpus
from chromarpc_server.runtime.device import DeviceSource
from chromarpc_server.runtime.local_devices import LocalDevices
from chromarpc_server.runtime.model_files import ModelFiles, ModelFilesElsewhere
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.settings import ServerSettings

log = logging.getLogger(__name__)


def device_source(settings: ServerSettings, running_time: RunningTime) -> DeviceSource:
    """Where jobs are computed.

    Raises:
        WeightsInvalid: a device is not there, or cannot be paired.
    """
    if settings.devices is not None and ray_devices(settings.devices) is not None:
        return _cluster(settings, running_time)
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


def _cluster(settings: ServerSettings, running_time: RunningTime) -> RayDevices:
    wanted, ray = ray_devices(settings.devices or ""), settings.ray
    assert wanted is not None  # noqa: S101 - whoever calls has looked
    hosts = HostSettings(
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        budgets=settings.budgets(),
        timeouts=settings.device_timeouts(),
        model_folders=tuple(settings.model_folder.items()),
        served_models=tuple(dict.fromkeys(settings.alias.get(model, model) for model in REGISTRY)),
        preloaded_models=tuple(settings.alias.get(model, model) for model in settings.preload),
        content_folder=ray.adapter_folder,
        content_bytes=ray.adapter_bytes,
    )
    size = ClusterSize(wanted.least, wanted.most)
    placement = RayPlacement(
        ray.address, on_cpus=settings.device == "cpu", least=wanted.least, running_time=running_time
    )
    # A GPU that has none for float8 products says so once it is there; a CPU has every profile.
    profiles = choose_device("cpu", settings.dtype).profiles
    chosen = ClusterSettings(size, hosts, profiles, ray.host, ray.port, ray.idle_s)
    return RayDevices(placement, chosen, running_time)


def model_files_of(settings: ServerSettings, devices: DeviceSource) -> ModelFiles:
    """Where the devices' hosts have models."""
    kind = ModelFilesElsewhere if isinstance(devices, RayDevices) else ModelFiles
    return kind(settings.model_folder)


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
