"""A server's two devices as its engine tells of them, for tests of what is told on: the second one is lost."""

from __future__ import annotations

from dataclasses import replace

from chromarpc_server.domain.devices import DeviceDescription, DeviceState
from chromarpc_server.domain.fallbacks import DeviceFallback, Part
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.domain.store_facts import StoreFacts
from chromarpc_server.jobs.engine import EngineStatus
from chromarpc_server.runtime.device import DeviceStatus
from chromarpc_server.runtime.model_cache import CacheCounters, CacheSnapshot, ResidentSet, SetKey

MODEL = "chroma"
FIRST = DeviceStatus(
    DeviceDescription(
        "cuda:0+cuda:1", "NVIDIA H100", 80_000, "bfloat16", ("exact", "fp8"), host="gpu-7", second="cuda:1"
    ),
    DeviceState.BUSY,
    CacheSnapshot(
        resident_bytes={MODEL: 900},
        trainer_parts_bytes={MODEL: 70},
        sets=(ResidentSet(SetKey(MODEL, "exact", ()), (("ab" * 32, 0.5),), 300),),
        counters=CacheCounters(hits=5, switches=2, builds=1, evictions=1),
        adapter_bytes=40,
        memory={MODEL: MemoryPlan("dequantized", "device", "host", False, True, 1000, 2000)},
    ),
    memory_used_bytes=1234,
    jobs=7,
    busy_s=61.5,
)
SECOND = DeviceStatus(
    DeviceDescription("cuda:2", "NVIDIA L40S", 48_000, "bfloat16", ("exact",)),
    DeviceState.IDLE,
    CacheSnapshot(
        resident_bytes={MODEL: 500},
        sets=(ResidentSet(SetKey(MODEL, "exact", ()), (), 100),),
        counters=CacheCounters(hits=1, builds=2),
        adapter_bytes=40,
        memory={MODEL: MemoryPlan("float8", "host", "host", True, True, 500, 600)},
        fallbacks=(DeviceFallback(Part.KERNELS, "none were built"),),
    ),
    memory_used_bytes=567,
    jobs=3,
    busy_s=20.0,
)
LOST = replace(SECOND, state=DeviceState.LOST, memory_used_bytes=0, lost_because="the device does not answer")


class EngineOf:
    """What looks on asks of an engine."""

    def __init__(self, *devices: DeviceStatus) -> None:
        self.devices = devices

    def status(self) -> EngineStatus:
        return EngineStatus(4, sum(one.state is DeviceState.BUSY for one in self.devices), self.devices)

    @property
    def is_available(self) -> bool:
        return any(one.state is not DeviceState.LOST for one in self.devices)

    def missing_devices(self) -> str:
        return "the cluster has no GPU now"

    def store_facts(self) -> StoreFacts:
        return StoreFacts(free_bytes=1)
