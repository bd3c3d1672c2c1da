"""`ModelService`: what this server serves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import grpc

from chromarpc.v1 import model_service_pb2, model_service_pb2_grpc
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.devices import DeviceState
from chromarpc_server.domain.models import IGNORED_OPTIONS, REFUSED_OPTIONS, MemoryPlan, ModelPart, ModelSpec
from chromarpc_server.domain.resolve import Serving
from chromarpc_server.domain.sampling_choices import SAMPLERS, SCHEDULES, DrawingSettings
from chromarpc_server.domain.trainer import MIN_SIZE_PX, PREVIEW_PROFILES, SIZE_MULTIPLE
from chromarpc_server.jobs.engine import Engine
from chromarpc_server.runtime.device import DeviceStatus, merged, withheld_because
from chromarpc_server.runtime.model_files import FoundPart, ModelFiles, fetch_command
from chromarpc_server.transport.messages.values import duration, shorten

_STATES = {state: model_service_pb2.DeviceState.Value(f"DEVICE_STATE_{state.name}") for state in DeviceState}


def _int32(limit: int) -> int:
    return min(limit, 2**31 - 1)


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Answers from snapshots; never waits for a device."""

    def __init__(
        self,
        engine: Engine,
        serving: Serving,
        model_files: ModelFiles,
        library: AdapterLibrary,
        *,
        version: str,
        library_versions: Mapping[str, str],
        profile_descriptions: Mapping[str, str],
    ) -> None:
        """`serving`: what the settings say about requests."""
        self._engine = engine
        self._serving = serving
        self._model_files = model_files
        self._library = library
        self._version = version
        self._library_versions = library_versions
        self._profile_descriptions = profile_descriptions

    async def ListModels(  # noqa: N802
        self,
        request: model_service_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[
            model_service_pb2.ListModelsRequest, model_service_pb2.ListModelsResponse
        ],
    ) -> model_service_pb2.ListModelsResponse:
        """Lists the models, whether their weights are here, and what their options default to."""
        specs = list(self._serving.models.values())
        found = await asyncio.to_thread(lambda: [self._found(self._served(spec)) for spec in specs])
        devices = self._engine.status().devices
        cache = merged([device.cache for device in devices])
        hidden = await asyncio.to_thread(self._library.hidden_from, current_caller().name)
        return model_service_pb2.ListModelsResponse(
            models=[self._model(spec, here, devices, hidden) for spec, here in zip(specs, found, strict=True)],
            cache=model_service_pb2.CacheStatistics(
                hit_count=cache.counters.hits,
                switch_count=cache.counters.switches,
                build_count=cache.counters.builds,
                eviction_count=cache.counters.evictions,
                adapter_bytes=cache.adapter_bytes,
            ),
        )

    async def GetServerInfo(  # noqa: N802
        self,
        request: model_service_pb2.GetServerInfoRequest,
        context: grpc.aio.ServicerContext[
            model_service_pb2.GetServerInfoRequest, model_service_pb2.GetServerInfoResponse
        ],
    ) -> model_service_pb2.GetServerInfoResponse:
        """Answers version, limits, numerics profiles and devices."""
        serving, status = self._serving, self._engine.status()
        devices = [_device(device) for device in status.devices]
        caller = current_caller()
        return model_service_pb2.GetServerInfoResponse(
            version=self._version,
            library_versions=dict(self._library_versions),
            device=devices[0] if devices else None,
            devices=devices,
            unavailable_because="" if self._engine.is_available else shorten(self._engine.missing_devices()),
            profiles=[
                model_service_pb2.Profile(id=name, description=self._profile_descriptions[name])
                for name in serving.profiles
            ],
            default_profile=serving.default_profile,
            limits=model_service_pb2.Limits(
                max_prompts=serving.limits.max_prompts,
                max_prompt_bytes=serving.limits.max_prompt_bytes,
                max_loras=serving.limits.max_loras,
                max_pixel_steps=min(serving.limits.max_pixel_steps, caller.limits.max_pixel_steps),
                max_queued_jobs=serving.limits.max_queued_jobs,
                max_request_bytes=serving.limits.max_request_bytes,
                max_pixels=serving.limits.max_pixels,
                max_streams=_int32(caller.limits.max_streams),
                max_queued_jobs_per_caller=_int32(caller.limits.max_queued_jobs),
                max_upload_bytes=self._library.uploads.limits.max_file_bytes,
                max_uploads_bytes_per_caller=caller.limits.max_upload_bytes,
                max_calls_per_minute=_int32(caller.limits.max_calls_per_minute),
            ),
            queue=model_service_pb2.QueueState(queued_jobs=status.queued_jobs, running_jobs=status.running_jobs),
            caller=caller.name,
            samplers=SAMPLERS,
            schedules=SCHEDULES,
            settings=[settings.value for settings in DrawingSettings],
        )

    def _served(self, spec: ModelSpec) -> ModelSpec:
        return self._serving.models[self._serving.aliases.get(spec.id, spec.id)]

    def _found(self, served: ModelSpec) -> _Found:
        return _Found(self._model_files.find(served) is not None, self._model_files.parts(served))

    def _model(
        self, spec: ModelSpec, found: _Found, devices: Sequence[DeviceStatus], hidden: frozenset[str]
    ) -> model_service_pb2.Model:
        served = self._served(spec)
        residences = list(_residences(served, devices))
        defaults = spec.defaults
        return model_service_pb2.Model(
            id=spec.id,
            description=spec.description,
            base_checkpoint=served.base_checkpoint,
            alias_of=served.id if served.id != spec.id else "",
            resolution_divisor=served.resolution_divisor,
            defaults=model_service_pb2.ModelDefaults(
                width=defaults.width,
                height=defaults.height,
                sample_steps=defaults.sample_steps,
                guidance_scale=defaults.guidance_scale,
                seed=defaults.seed,
                network_multiplier=defaults.network_multiplier,
                sampler=defaults.sampler,
                schedule=defaults.schedule,
                shift=defaults.shift,
                profile=defaults.profile,
            ),
            weights_present=found.is_present,
            fetch_command=found.fetch_command(served),
            resident=bool(residences),
            resident_bytes=sum(residence.resident_bytes for residence in residences),
            ignored_options=IGNORED_OPTIONS,
            refused_options=REFUSED_OPTIONS,
            resident_sets=[
                model_service_pb2.ResidentSet(
                    profile=held.key.profile,
                    adapters=[
                        model_service_pb2.ResidentAdapter(sha256=sha256, network_multiplier=multiplier)
                        for sha256, multiplier in held.adapters
                    ],
                    size_bytes=held.size_bytes,
                    device_id=device.description.id,
                )
                for device in _working(devices)
                for held in device.cache.sets
                if held.key.model_id == served.id and hidden.isdisjoint(sha256 for sha256, _ in held.adapters)
            ],
            memory_plan=next(
                (residence.memory_plan for residence in residences if residence.HasField("memory_plan")), None
            ),
            profiles=[_profile(name, served, devices) for name in self._serving.profiles],
            residences=residences,
            parts=[_part(part, served, devices) for part in found.parts],
            base_name=served.base_name,
        )


@dataclass(frozen=True)
class _Found:
    """What there is of a model on this machine."""

    is_present: bool
    parts: tuple[FoundPart, ...]

    def fetch_command(self, spec: ModelSpec) -> str:
        """What fetches the rest of it; empty where nothing is missing, or nothing fetches it."""
        if self.is_present:
            return ""
        return fetch_command(spec, [part.source for part in self.parts if not part.is_present])


def _part(found: FoundPart, served: ModelSpec, devices: Sequence[DeviceStatus]) -> model_service_pb2.ModelPart:
    # The transformer alone is hashed when it is loaded; it is what adapters change.
    is_hashed = found.part is ModelPart.TRANSFORMER
    revisions = [device.cache.revisions.get(served.id, "") for device in _working(devices)] if is_hashed else []
    return model_service_pb2.ModelPart(
        part=found.part,
        source=str(found.source),
        present=found.is_present,
        stored_as=found.facts.stored_as,
        revision=next(filter(None, revisions), ""),
        problem=shorten(found.problem),
    )


def _profile(name: str, served: ModelSpec, devices: Sequence[DeviceStatus]) -> model_service_pb2.ModelProfile:
    is_preview = name in PREVIEW_PROFILES
    return model_service_pb2.ModelProfile(
        id=name,
        resolution_divisor=SIZE_MULTIPLE if is_preview else served.resolution_divisor,
        min_size_px=MIN_SIZE_PX,
        honours_neg=is_preview,
        takes_trainer_options=is_preview,
        unavailable_because=shorten(withheld_because(name, served.id, devices)),
    )


def _device(status: DeviceStatus) -> model_service_pb2.Device:
    device = status.description
    return model_service_pb2.Device(
        id=device.id,
        name=device.name,
        memory_bytes=device.memory_bytes,
        dtype=device.dtype,
        fallbacks=[
            model_service_pb2.DeviceFallback(without=str(fallback.without), message=fallback.message)
            for fallback in status.cache.fallbacks
        ],
        state=_STATES[status.state],
        profiles=device.profiles,
        host=device.host,
        second=device.second,
        job_count=status.jobs,
        busy_time=duration(status.busy_s),
        memory_used_bytes=status.memory_used_bytes,
        lost_because=shorten(status.lost_because),
    )


def _working(devices: Sequence[DeviceStatus]) -> Iterator[DeviceStatus]:
    """Those whose memory still counts: of a lost one nothing can be used again."""
    return (device for device in devices if device.state is not DeviceState.LOST)


def _residences(served: ModelSpec, devices: Sequence[DeviceStatus]) -> Iterator[model_service_pb2.ModelResidence]:
    for device in _working(devices):
        resident_bytes = device.cache.resident_bytes.get(served.id)
        if resident_bytes is not None:
            yield model_service_pb2.ModelResidence(
                device_id=device.description.id,
                resident_bytes=resident_bytes,
                memory_plan=_memory_plan(device.cache.memory.get(served.id)),
            )


def _memory_plan(plan: MemoryPlan | None) -> model_service_pb2.MemoryPlan | None:
    if plan is None:
        return None
    return model_service_pb2.MemoryPlan(
        weights=plan.weights,
        text_encoder=plan.text_encoder,
        master=plan.master,
        tile_autoencoder=plan.tile_autoencoder,
        record_graphs=plan.record_graphs,
        estimated_bytes=plan.estimated_bytes,
        usable_bytes=plan.usable_bytes,
        streamed_blocks=plan.streamed_blocks,
        host_bytes=plan.host_bytes,
        host_available_bytes=plan.host_available_bytes,
    )
