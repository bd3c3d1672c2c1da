"""`ModelService`: what this server serves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc

from chromarpc.v1 import model_service_pb2, model_service_pb2_grpc
from chromarpc_server.adapters.library import AdapterLibrary
from chromarpc_server.domain.callers import current_caller
from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.models import IGNORED_OPTIONS, REFUSED_OPTIONS, MemoryPlan, ModelSpec
from chromarpc_server.domain.resolve import Serving
from chromarpc_server.domain.trainer import MIN_SIZE_PX, PREVIEW_PROFILES, SIZE_MULTIPLE
from chromarpc_server.jobs.engine import Engine
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.runtime.model_files import ModelFiles, fetch_command


def _int32(limit: int) -> int:
    return min(limit, 2**31 - 1)


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Answers from snapshots; never waits for the device."""

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
        present = await asyncio.to_thread(
            lambda: [self._model_files.find(self._served(spec)) is not None for spec in specs]
        )
        cache = self._engine.status().cache
        hidden = await asyncio.to_thread(self._library.hidden_from, current_caller().name)
        return model_service_pb2.ListModelsResponse(
            models=[self._model(spec, here, cache, hidden) for spec, here in zip(specs, present, strict=True)],
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
        """Answers version, limits, numerics profiles and device."""
        serving, device, status = self._serving, self._engine.description, self._engine.status()
        device = device or DeviceDescription("", "", 0, "")
        caller = current_caller()
        return model_service_pb2.GetServerInfoResponse(
            version=self._version,
            library_versions=dict(self._library_versions),
            device=model_service_pb2.Device(
                id=device.id,
                name=device.name,
                memory_bytes=device.memory_bytes,
                dtype=device.dtype,
                fallbacks=[
                    model_service_pb2.DeviceFallback(without=str(fallback.without), message=fallback.message)
                    for fallback in status.cache.fallbacks
                ],
            ),
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
        )

    def _served(self, spec: ModelSpec) -> ModelSpec:
        return self._serving.models[self._serving.aliases.get(spec.id, spec.id)]

    def _model(
        self, spec: ModelSpec, present: bool, cache: CacheSnapshot, hidden: frozenset[str]
    ) -> model_service_pb2.Model:
        served = self._served(spec)
        resident_bytes = cache.resident_bytes.get(served.id)
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
            ),
            weights_present=present,
            fetch_command="" if present else fetch_command(served),
            resident=resident_bytes is not None,
            resident_bytes=resident_bytes or 0,
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
                )
                for held in cache.sets
                if held.key.model_id == served.id and hidden.isdisjoint(sha256 for sha256, _ in held.adapters)
            ],
            memory_plan=_memory_plan(cache.memory.get(served.id)),
            profiles=[_profile(name, served) for name in self._serving.profiles],
        )


def _profile(name: str, served: ModelSpec) -> model_service_pb2.ModelProfile:
    is_preview = name in PREVIEW_PROFILES
    return model_service_pb2.ModelProfile(
        id=name,
        resolution_divisor=SIZE_MULTIPLE if is_preview else served.resolution_divisor,
        min_size_px=MIN_SIZE_PX,
        honours_neg=is_preview,
        takes_trainer_options=is_preview,
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
    )
