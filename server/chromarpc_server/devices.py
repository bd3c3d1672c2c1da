"""Composition of the devices: which compute, as the settings say."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from chromarpc_server.cluster.cluster_size import ClusterSize
from chromarpc_server.cluster.messages import HostSettings
from chromarpc_server.cluster.placement import RayPlacement
from chromarpc_server.cluster.ray_devices import ClusterSettings, RayDevices
from chromarpc_server.device_settings import ray_devices
from chromarpc_server.domain.errors import InvalidParameter
from chromarpc_server.domain.models import ModelSpec
from chromarpc_server.pipeline import PROFILES, TRAINER_CHOICES, choose_device, choose_devices, idle_gpus
from chromarpc_server.runtime.device import DeviceSource
from chromarpc_server.runtime.local_devices import LocalDevices
from chromarpc_server.runtime.model_files import ModelFiles, ModelFilesElsewhere
from chromarpc_server.runtime.running_time import RunningTime
from chromarpc_server.settings import ServerSettings

log = logging.getLogger(__name__)


def device_source(
    settings: ServerSettings, models: Mapping[str, ModelSpec], running_time: RunningTime
) -> DeviceSource:
    """Where jobs are computed, and `models` with them.

    Raises:
        WeightsInvalid: a device is not there, or cannot be paired.
    """
    if settings.devices is not None and ray_devices(settings.devices) is not None:
        return _cluster(settings, models, running_time)
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


def _cluster(settings: ServerSettings, models: Mapping[str, ModelSpec], running_time: RunningTime) -> RayDevices:
    wanted, ray = ray_devices(settings.devices or ""), settings.ray
    assert wanted is not None  # noqa: S101 - whoever calls has looked
    hosts = HostSettings(
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        budgets=settings.budgets(),
        timeouts=settings.device_timeouts(),
        model_folders=tuple(settings.model_folder.items()),
        models=tuple(models.values()),
        served_models=tuple(dict.fromkeys(settings.alias.get(model, model) for model in models)),
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


def require_profiles(settings: ServerSettings, models: Mapping[str, ModelSpec], devices: DeviceSource) -> None:
    """Checks that a device computes the default profile, and those of models.

    Raises:
        InvalidParameter: none does.
    """
    _require_profile(settings.profile, "", settings, devices)
    for spec in models.values():
        if spec.defaults.profile:
            _require_profile(spec.defaults.profile, f"--model {spec.id}: profile: ", settings, devices)


def _require_profile(name: str, where: str, settings: ServerSettings, devices: DeviceSource) -> None:
    if name in devices.profiles:
        return
    if name not in PROFILES:
        raise InvalidParameter(f"{where}no such profile: {name}; known are {', '.join(PROFILES)}")
    is_other_dtype = name == "preview-exact" and settings.dtype not in TRAINER_CHOICES
    needs = (
        f"computes in bfloat16, as the trainer does, and --dtype says {settings.dtype}"
        if is_other_dtype
        else "needs a GPU of compute capability 8.9 or more"
    )
    raise InvalidParameter(f"{where}the profile {name} {needs}")
