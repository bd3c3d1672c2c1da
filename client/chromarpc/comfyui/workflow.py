"""A workflow that was understood, and the request that it becomes on a server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Unpack

from chromarpc.comfyui.graph import Node
from chromarpc.comfyui.matching import (
    ServedModel,
    base_name,
    file_of,
    find_loras,
    find_model,
    part_source,
    stored_as,
)
from chromarpc.comfyui.model_line import Adapter, ModelFile
from chromarpc.comfyui.problems import Findings, WorkflowNotMapped
from chromarpc.loras import LoraList, StoredLora
from chromarpc.request import GenerateOptions, build_request
from chromarpc.sampling import COMFYUI
from chromarpc.v1 import generation_service_pb2, model_service_pb2

_SIDES: Final = ("width", "height")
_FILES: Final = (".safetensors", ".sft", ".gguf", ".pt", ".bin", ".ckpt")
"""How files of weights end; a part may be a folder, too."""


@dataclass(frozen=True)
class MappedRequest:
    """A workflow's request for one server."""

    request: generation_service_pb2.GenerateRequest
    remarks: tuple[str, ...]
    """What was taken otherwise than it stands there, or left out without harm; sentences for people."""


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """What a workflow draws, by the request's names."""

    prompt: str = field(repr=False)
    neg: str = field(repr=False)
    """Negative text; empty where there is none, or none that can be read and no unconditional pass."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    sample_steps: int
    guidance_scale: float
    seed: int
    sampler: str
    """ComfyUI's name; whether a server has it, the server says."""
    schedule: str
    """ComfyUI's `scheduler`, the same."""
    shift: float | None
    """None: ComfyUI's own for Chroma."""
    model_file: ModelFile
    adapters: tuple[Adapter, ...]
    """In the order in which they are applied."""
    text_encoder_file: str
    """Empty where the workflow does not name one of its own."""
    autoencoder_file: str
    """The same."""
    size_node: Node = field(repr=False)
    """Where the size comes from."""
    schedule_node: Node = field(repr=False)
    """Where the schedule comes from."""
    unread: frozenset[str] = frozenset()
    """Options that `request` has to get, since what the workflow has in their place was not read."""
    remarks: tuple[str, ...] = ()
    """What of the workflow was left out without harm."""

    def request(
        self,
        models: Iterable[model_service_pb2.Model] | None = None,
        stored_loras: LoraList | Iterable[StoredLora] | None = None,
        *,
        prompt: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> generation_service_pb2.GenerateRequest:
        """The request that draws it; `map` gives its remarks, too.

        Args:
            models: the server's, as `list_models` gives them. Without, `model` has to be given.
            stored_loras: the server's, as `list_loras` gives them. Without, adapters keep the workflow's names.
            prompt: in place of the workflow's.
            options: in place of what the workflow says; see `GenerateOptions`.

        Raises:
            WorkflowNotMapped: something of it cannot be drawn by this server; every such thing is named.
            InvalidRequest: an option that no request can hold.
            ValueError: an option of `unread` is not given.
        """
        return self.map(models, stored_loras, prompt=prompt, **options).request

    def map(
        self,
        models: Iterable[model_service_pb2.Model] | None = None,
        stored_loras: LoraList | Iterable[StoredLora] | None = None,
        *,
        prompt: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> MappedRequest:
        """The request that draws it, and what is to be said of it; arguments and errors as of `request`."""
        found = Findings()
        given = {name: value for name, value in options.items() if value is not None}
        missing = self.unread - given.keys() - ({"prompt"} if prompt is not None else set())
        if missing:
            raise ValueError(f"not read from the workflow, so to be given: {', '.join(sorted(missing))}")
        served = found.attempt(
            find_model, self.model_file, None if models is None else tuple(models), options.get("model")
        )
        if served is not None:
            self._check_weights(served, found)
            if served.message is not None:
                self._check_model(served.message, given, found)
        said: dict[str, Any] = {**self._values(given), **given}
        if "loras" not in given:
            said["loras"] = find_loras(self.adapters, stored_loras, found)
        if found.problems or served is None:
            raise WorkflowNotMapped(found.problems)
        said["model"] = served.id
        request = build_request(self.prompt if prompt is None else prompt, **said)
        return MappedRequest(request, (*self.remarks, *found.remarks))

    def _values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the workflow says, as `build_request` takes it."""
        values: dict[str, Any] = {
            "settings": COMFYUI,
            "width": self.width,
            "height": self.height,
            "sample_steps": self.sample_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "sampler": self.sampler,
            "schedule": self.schedule,
            "shift": self.shift,
        }
        neg = given.get("neg", self.neg)
        if neg and not is_single_pass(given.get("guidance_scale", self.guidance_scale)):
            values |= {"neg": neg, "use_neg": True}
        return values

    def _check_weights(self, served: ServedModel, found: Findings) -> None:
        dtype = self.model_file.rounded_to
        stored = "" if served.message is None else stored_as(served.message)
        if dtype and "fp8" not in stored:
            found.refuse(
                self.model_file.node.problem(
                    "weight_dtype",
                    f"weights are not rounded to {dtype} here: set it to default, or serve a file that holds fp8",
                )
            )

    def _check_model(self, model: model_service_pb2.Model, given: Mapping[str, Any], found: Findings) -> None:
        divisor = _divisor(model, given.get("profile"))
        for side in _SIDES:
            pixels = getattr(self, side)
            if divisor and side not in given and pixels % divisor:
                found.refuse(
                    self.size_node.problem(
                        side, f"is {pixels}, and {model.id} draws multiples of {divisor}: give another {side}"
                    )
                )
        defaults = model.defaults
        if (
            self.shift is None
            and defaults.HasField("shift")
            and defaults.schedule == self.schedule
            and not {"shift", "schedule"} & given.keys()
        ):
            found.refuse(
                self.schedule_node.problem(
                    "model",
                    f"no node sets a shift, so ComfyUI takes its own, while {model.id} has {defaults.shift:g} by "
                    "default: add ModelSamplingAuraFlow, or give a shift",
                )
            )
        for name, file in (("text_encoder", self.text_encoder_file), ("autoencoder", self.autoencoder_file)):
            ours = file_of(part_source(model, name))
            if file and ours.lower().endswith(_FILES) and ours.casefold() != base_name(file).casefold():
                found.remark(f"the {name.replace('_', ' ')} is {model.id}'s, {ours}, not {base_name(file)}")


def is_single_pass(guidance_scale: float) -> bool:
    """Whether ComfyUI makes no unconditional pass."""
    return math.isclose(guidance_scale, 1.0)


def _divisor(model: model_service_pb2.Model, profile: str | None) -> int:
    """What widths and heights have to be multiples of; 0 where the server does not say."""
    own = (each.resolution_divisor for each in model.profiles if each.id == profile)
    return next(own, model.resolution_divisor)
