"""`chromarpc models`, `info` and `health`: short questions to a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, TypeAlias

import typer

from chromarpc.cli.connection import with_client
from chromarpc.cli.event_json import message_json
from chromarpc.cli.exits import ExitCode, printable
from chromarpc.cli.progress import bytes_text, seconds_text
from chromarpc.client import Client
from chromarpc.health import HealthStatus
from chromarpc.v1 import model_service_pb2

AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, under the schema's names.")]


@with_client
def models(client: Client, *, as_json: AsJson = False) -> None:
    """List the models that a server serves."""
    found = client.list_models()
    if as_json:
        typer.echo(json.dumps({"models": [message_json(model) for model in found]}, indent=2))
        return
    id_width = max((len(model.id) for model in found), default=0)
    for model in found:
        for number, line in enumerate(_model_lines(model)):
            typer.echo(printable(f"{'' if number else model.id:{id_width}}  {line}"))


@with_client
def info(client: Client, *, as_json: AsJson = False) -> None:
    """Describe a server: devices, limits, queue."""
    found = client.server_info()
    if as_json:
        typer.echo(json.dumps(message_json(found), indent=2))
        return
    for line in _info_lines(found):
        typer.echo(printable(line))


@with_client
def health(
    client: Client,
    *,
    wait: Annotated[
        float | None, typer.Option(min=0, help="Wait up to so many seconds until it takes requests.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether a server takes requests.

    Exits with 0 if it does, with 3 if it does not or nobody answers, with 6 if --wait passed.
    """
    if wait is not None:
        client.wait_until_serving(timeout_s=wait)
    status = client.health()
    typer.echo(json.dumps({"status": status}) if as_json else status)
    if status is not HealthStatus.SERVING:
        raise typer.Exit(ExitCode.UNAVAILABLE)


def _model_lines(model: model_service_pb2.Model) -> Iterator[str]:
    if model.alias_of:
        yield f"served by {model.alias_of}"
    elif model.resident:
        on = ", ".join(residence.device_id for residence in model.residences)
        yield f"in memory ({bytes_text(model.resident_bytes)})" + (f" of {on}" if on else "")
    elif model.weights_present:
        yield "cannot be used" if any(part.problem for part in model.parts) else "ready"
    else:
        command = model.fetch_command  # a bundled model has none
        yield "weights are missing" + (f"; on the server, run: {command}" if command else "")
    if not model.alias_of:
        yield from _part_lines(model)
    for held in model.resident_sets:
        adapters = [f"{adapter.sha256[:12]} x {adapter.network_multiplier:g}" for adapter in held.adapters]
        merged = " + ".join(adapters) or "no adapters"
        on = f" on {held.device_id}" if held.device_id else ""
        yield f"prepared: {merged}, {held.profile} ({bytes_text(held.size_bytes)}){on}"
    if model.description:
        yield model.description
    if model.HasField("defaults"):
        defaults = model.defaults
        yield (
            f"defaults: {defaults.width}x{defaults.height}, {defaults.sample_steps} steps, "
            f"guidance {defaults.guidance_scale:g}, seed {defaults.seed}{_sampling_text(defaults)}"
        )
    for profile in model.profiles:
        if profile.takes_trainer_options:
            neg = ", negative text is honoured" if profile.honours_neg else ""
            yield f"in {profile.id}: sizes are floored to {profile.resolution_divisor}{neg}"


def _sampling_text(defaults: model_service_pb2.ModelDefaults) -> str:
    """What it is sampled with; nothing of an older server, which has one way."""
    if not defaults.sampler:
        return ""
    shift = f", shift {defaults.shift:g}" if defaults.HasField("shift") else ""
    profile = f", profile {defaults.profile}" if defaults.profile else ""
    return f", sampler {defaults.sampler}, schedule {defaults.schedule}{shift}{profile}"


def _part_lines(model: model_service_pb2.Model) -> Iterator[str]:
    """What it is made of, and how that is stored."""
    for part in model.parts:
        name = part.part.replace("_", " ")
        if part.problem:
            yield f"{name}: {part.source} cannot be used: {part.problem}"
        elif not part.present:
            yield f"{name}: {part.source} is missing"
        elif part.stored_as:
            yield f"{name}: {part.source}, {part.stored_as}"
    if model.base_name and model.base_name != model.base_checkpoint:
        yield f"adapters for it name {model.base_name} as their base"


def _device_lines(found: model_service_pb2.GetServerInfoResponse) -> Iterator[str]:
    if found.unavailable_because:
        yield f"device     none now, jobs wait: {found.unavailable_because}"
    if len(found.devices) > 1:
        yield f"devices    {len(found.devices)}"
        for device in found.devices:
            name = f"{device.name} on {device.host}" if device.host else device.name
            yield f"  {device.id} ({name}, {bytes_text(device.memory_bytes)}, {device.dtype}): {_doing(device)}"
            yield from (f"    {fallback.message}" for fallback in device.fallbacks)
    elif found.HasField("device"):
        device = found.device
        yield f"device     {device.id} ({device.name}, {bytes_text(device.memory_bytes)}, {device.dtype})"
        yield from (f"  {fallback.message}" for fallback in device.fallbacks)


def _doing(device: model_service_pb2.Device) -> str:
    """What a device does now, or why it does nothing any more."""
    state = model_service_pb2.DeviceState.Name(device.state).removeprefix("DEVICE_STATE_").lower()
    if device.lost_because:
        return f"{state}, {device.lost_because}"
    if not device.job_count:
        return state
    jobs = "1 job" if device.job_count == 1 else f"{device.job_count} jobs"
    return f"{state}, {jobs} in {seconds_text(device.busy_time.ToTimedelta().total_seconds())}"


def _info_lines(found: model_service_pb2.GetServerInfoResponse) -> Iterator[str]:
    limits, queue = found.limits, found.queue
    yield f"chromarpc  {found.version}"
    for name, version in sorted(found.library_versions.items()):
        yield f"  {name}: {version}"
    yield from _device_lines(found)
    yield f"queue      {queue.running_jobs} running, {queue.queued_jobs} waiting"
    yield "profiles"
    for profile in found.profiles:
        default = " (default)" if profile.id == found.default_profile else ""
        yield f"  {profile.id}{default}: {profile.description}"
    for title, names in (
        ("samplers", found.samplers),
        ("schedules", found.schedules),
        ("settings", found.settings),
    ):
        if names:
            yield f"{title:<9}  {', '.join(names)}"
    yield "limits"
    for name, value in message_json(limits).items():
        yield f"  {name}: {value}"
