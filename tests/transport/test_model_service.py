"""`GetServerInfo` and `ListModels` of servers with two devices, with one that is lost, with one, and with none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chromarpc.v1 import model_service_pb2
from chromarpc_server.domain.models import REGISTRY
from chromarpc_server.domain.resolve import Serving
from chromarpc_server.domain.sampling_choices import SAMPLERS, SCHEDULES
from chromarpc_server.runtime.device import DeviceStatus
from chromarpc_server.runtime.model_files import ModelFiles
from chromarpc_server.transport.services.models import ModelServicer
from tests.two_devices import FIRST, LOST, MODEL, SECOND, EngineOf

PAIR, OTHER = FIRST.description.id, SECOND.description.id


class Library:
    def __init__(self, hidden: str) -> None:
        self._hidden = frozenset([hidden])
        self.uploads = SimpleNamespace(limits=SimpleNamespace(max_file_bytes=1))

    def hidden_from(self, caller: str) -> frozenset[str]:
        return self._hidden


def servicer(*devices: DeviceStatus, hidden: str = "") -> ModelServicer:
    engine: Any = EngineOf(*devices)
    library: Any = Library(hidden)
    profiles = {"reference": "close to the trainer's"}
    serving = Serving(profiles=("reference",))
    return ModelServicer(
        engine,
        serving,
        ModelFiles({}),
        library,
        version="1",
        library_versions={},
        profile_descriptions=profiles,
    )


async def info(*devices: DeviceStatus) -> model_service_pb2.GetServerInfoResponse:
    context: Any = None
    return await servicer(*devices).GetServerInfo(model_service_pb2.GetServerInfoRequest(), context)


async def listed(*devices: DeviceStatus, hidden: str = "") -> model_service_pb2.ListModelsResponse:
    context: Any = None
    call = servicer(*devices, hidden=hidden).ListModels
    return await call(model_service_pb2.ListModelsRequest(), context)


async def model(*devices: DeviceStatus, hidden: str = "") -> model_service_pb2.Model:
    found = (await listed(*devices, hidden=hidden)).models
    return next(one for one in found if one.id == MODEL)


async def test_every_device_is_listed_with_what_it_is_and_does() -> None:
    found = await info(FIRST, SECOND)
    pair, other = found.devices
    assert (pair.id, pair.second, pair.host) == (PAIR, "cuda:1", "gpu-7")
    assert (pair.name, pair.memory_bytes, pair.dtype) == ("NVIDIA H100", 80_000, "bfloat16")
    assert (pair.state, other.state) == (model_service_pb2.DEVICE_STATE_BUSY, model_service_pb2.DEVICE_STATE_IDLE)
    assert (list(pair.profiles), list(other.profiles)) == (["exact", "fp8"], ["exact"])
    assert (pair.job_count, pair.busy_time.ToMilliseconds(), pair.memory_used_bytes) == (7, 61_500, 1234)
    assert (other.id, other.second, other.host, other.lost_because) == (OTHER, "", "", "")
    assert [fallback.without for fallback in other.fallbacks] == ["kernels"]
    assert not pair.fallbacks, "what one device does without is not another's"
    assert found.queue.running_jobs == 1


async def test_what_requests_may_name_is_listed() -> None:
    found = await info(FIRST)
    assert list(found.samplers) == list(SAMPLERS)
    assert list(found.schedules) == list(SCHEDULES)
    assert list(found.settings) == ["reference", "comfyui"]


async def test_a_model_says_what_it_is_sampled_with_by_default() -> None:
    defaults = (await model(FIRST)).defaults
    assert (defaults.sampler, defaults.schedule, defaults.HasField("shift"), defaults.profile) == (
        "flowmatch",
        "flowmatch",
        False,
        "",
    )


async def test_the_device_of_older_clients_is_the_first_one() -> None:
    found = await info(SECOND)
    assert found.device == found.devices[0]
    assert (found.device.id, [one.without for one in found.device.fallbacks]) == (OTHER, ["kernels"])


async def test_a_lost_device_stays_listed_and_says_why_it_is_out() -> None:
    found = await info(FIRST, LOST)
    lost = found.devices[1]
    assert (lost.state, lost.lost_because) == (
        model_service_pb2.DEVICE_STATE_LOST,
        "the device does not answer",
    )
    assert lost.job_count == 3
    assert found.unavailable_because == "", "another one is left"


@pytest.mark.parametrize("devices", [(), (LOST,)], ids=["none yet", "all lost"])
async def test_a_server_without_a_device_says_why(devices: tuple[DeviceStatus, ...]) -> None:
    found = await info(*devices)
    assert found.unavailable_because == "the cluster has no GPU now"
    assert found.HasField("device") is bool(devices)
    assert len(found.devices) == len(devices)


async def test_a_model_says_which_device_has_what_of_it() -> None:
    found = await model(FIRST, SECOND)
    assert [(one.device_id, one.resident_bytes) for one in found.residences] == [(PAIR, 900), (OTHER, 500)]
    assert [one.memory_plan.weights for one in found.residences] == ["dequantized", "float8"]
    assert [(held.device_id, held.size_bytes) for held in found.resident_sets] == [(PAIR, 300), (OTHER, 100)]
    assert (found.resident, found.resident_bytes) == (True, 1400)
    assert found.memory_plan == found.residences[0].memory_plan


async def test_of_one_device_a_model_says_what_it_said_before() -> None:
    found = await model(SECOND)
    assert (found.resident, found.resident_bytes, found.memory_plan.weights) == (True, 500, "float8")
    assert [(held.profile, held.size_bytes) for held in found.resident_sets] == [("exact", 100)]


async def test_what_a_lost_device_had_is_resident_no_more_and_its_counts_stay() -> None:
    found = await listed(FIRST, LOST)
    (chroma,) = (one for one in found.models if one.id == MODEL)
    assert [one.device_id for one in chroma.residences] == [PAIR]
    assert [held.device_id for held in chroma.resident_sets] == [PAIR]
    assert chroma.resident_bytes == 900
    assert (found.cache.hit_count, found.cache.build_count) == (6, 3)


async def test_parsed_adapters_are_the_hosts_and_count_once() -> None:
    assert (await listed(FIRST, SECOND)).cache.adapter_bytes == 40


async def test_what_is_resident_nowhere_has_no_residence() -> None:
    found = await listed(FIRST, SECOND)
    others = [one for one in found.models if one.id != MODEL]
    assert len(others) == len(REGISTRY) - 1
    assert not any(one.resident or one.residences or one.HasField("memory_plan") for one in others)


async def test_somebody_elses_adapter_is_hidden_on_every_device() -> None:
    found = await model(FIRST, SECOND, hidden="ab" * 32)
    assert [held.device_id for held in found.resident_sets] == [OTHER]
