"""Which of a server's models and profiles a run is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from chromarpc.client import Client
from chromarpc.replay.settings import TrainingRun
from chromarpc.request import DEFAULT_MODEL
from chromarpc.v1 import model_service_pb2

PROFILES: Final = ("preview", "preview-exact")
"""The profiles that draw the trainer's own picture; the first that a server has is taken."""


class Unusable(Exception):
    """Nothing can be drawn of this folder, or on this server; a sentence for people."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where it is drawn."""

    version: str
    device: str
    """The model of its device; of several, each model once, since any of them may draw."""
    dtype: str
    model: str
    served_model: str
    base_checkpoint: str
    profile: str

    @property
    def identity(self) -> str:
        """Tells it from servers that may draw otherwise."""
        return "|".join((self.version, self.device, self.dtype, self.served_model, self.profile))


def choose(
    client: Client,
    run: TrainingRun,
    *,
    model: str | None,
    profile: str | None,
    in_flight: int,
    assumptions: list[str],
) -> tuple[Server, int]:
    """The server, the model and the profile to draw with, and how many drawings to ask for at once.

    Args:
        client: the server.
        run: whose base model is looked for.
        model: asked for; None finds the run's.
        profile: asked for; None takes the first of `PROFILES` that is served.
        in_flight: as many as are wished for at once.
        assumptions: told what was assumed.

    Raises:
        Unusable: the server lacks the model or the profile.
        StatusError: it cannot be asked.
    """
    info, models = client.server_info(), client.list_models()
    served = [profile.id for profile in info.profiles]
    chosen = profile or next((one for one in PROFILES if one in served), None)
    if chosen is None:
        raise Unusable(f"the server serves none of the profiles {', '.join(PROFILES)}; it has {', '.join(served)}")
    if chosen not in served:
        raise Unusable(f"the server does not serve the profile {chosen}; it has {', '.join(served)}")
    if chosen not in PROFILES:
        assumptions.append(f"The profile {chosen} does not draw the trainer's own picture.")
    found = _model(models, run, model, assumptions)
    limits = [limit for limit in (info.limits.max_streams, info.limits.max_queued_jobs,
                                  info.limits.max_queued_jobs_per_caller) if limit > 0]  # fmt: skip
    server = Server(
        version=info.version,
        device=_models_of_devices(info),
        dtype=info.device.dtype,
        model=found.id,
        served_model=found.alias_of or found.id,
        base_checkpoint=found.base_checkpoint,
        profile=chosen,
    )
    return server, min([in_flight, *limits])


def _models_of_devices(info: model_service_pb2.GetServerInfoResponse) -> str:
    devices = info.devices or [info.device]  # older servers have no list
    found = {f"{one.name or one.id}{', guidance on two' if one.second else ''}" for one in devices}
    return "; ".join(sorted(found))


def _model(
    models: Sequence[model_service_pb2.Model], run: TrainingRun, asked: str | None, assumptions: list[str]
) -> model_service_pb2.Model:
    by_id = {model.id: model for model in models}
    known = ", ".join(by_id)
    if asked is not None:
        if asked not in by_id:
            raise Unusable(f"the server has no model {asked}; it has {known}")
        return by_id[asked]
    wanted = run.base_model
    stem = wanted.replace("\\", "/").rstrip("/").rpartition("/")[2].removesuffix(".safetensors")
    exact = next((model for model in models if wanted and model.base_checkpoint == wanted), None)
    # Its weights in another file, where the server lacks the trainer's own.
    based = next(
        (model for model in models if wanted and model.weights_present and model.base_name == wanted), None
    )
    if based is not None and (exact is None or not exact.weights_present):
        assumptions.append(
            f"Base model: {stem!r} is the base of the server's model {based.id!r}, whose file may hold other "
            "weights."
        )
        return based
    found = exact or by_id.get(stem) or by_id.get(DEFAULT_MODEL)
    if found is None:
        raise Unusable(f"say --model: the config's base model is {wanted!r}, the server has {known}")
    if found.id == stem and exact is None:
        assumptions.append(f"Base model: {stem!r}, found by its name; a file of that name may hold other weights.")
    elif exact is None:
        assumptions.append(f"Base model: the config names {stem!r}; taken for the server's model {found.id!r}.")
    return found
