"""What `ListModels` tells of each profile that is served."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from chromarpc.v1 import model_service_pb2
from chromarpc_server.domain.resolve import Serving
from chromarpc_server.runtime.model_cache import CacheSnapshot
from chromarpc_server.transport.services.models import ModelServicer


def _models(serving: Serving) -> dict[str, model_service_pb2.Model]:
    idle: Any = SimpleNamespace(status=lambda: SimpleNamespace(cache=CacheSnapshot(), devices=()))
    nothing: Any = SimpleNamespace(
        find=lambda spec: None, parts=lambda spec: (), hidden_from=lambda owner: frozenset()
    )
    servicer = ModelServicer(
        idle, serving, nothing, nothing, version="1", library_versions={}, profile_descriptions={}
    )
    context: Any = None
    listed = asyncio.run(servicer.ListModels(model_service_pb2.ListModelsRequest(), context))
    return {model.id: model for model in listed.models}


def test_every_served_profile_tells_its_sizes_and_what_it_takes() -> None:
    models = _models(Serving(profiles=("reference", "preview-exact")))
    for model in models.values():
        assert list(model.profiles) == [
            model_service_pb2.ModelProfile(id="reference", resolution_divisor=32, min_size_px=64),
            model_service_pb2.ModelProfile(
                id="preview-exact",
                resolution_divisor=16,
                min_size_px=64,
                honours_neg=True,
                takes_trainer_options=True,
            ),
        ]
        assert model.resolution_divisor == 32


def test_a_profile_that_is_not_served_is_not_told_of() -> None:
    assert [profile.id for profile in _models(Serving())["chroma"].profiles] == ["reference", "exact", "fp8"]
