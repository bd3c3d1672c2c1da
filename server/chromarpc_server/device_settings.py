"""What `--devices` may say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field

from chromarpc_server.transport.addresses import parse_tcp_host

_RAY = re.compile(r"ray(:[1-9]\d*|:\d+-[1-9]\d*)?")
_LOCAL = re.compile(r"all|(cpu|cuda|cuda:\d+)(,(cpu|cuda:\d+))*")


@dataclass(frozen=True)
class RayDevices:
    """Devices of a Ray cluster."""

    least: int
    """That are asked for, whether they are used or not."""
    most: int | None
    """None: as many as the cluster has."""


def _checked(text: str) -> str:
    if not (_LOCAL.fullmatch(text) or _RAY.fullmatch(text)):
        raise ValueError(f"{text}: write all, a list such as cuda:0,cuda:2 or cpu,cpu, or ray, ray:N, ray:MIN-MAX")
    ray_devices(text)
    return text


def ray_devices(text: str) -> RayDevices | None:
    """`ray`, `ray:N` and `ray:MIN-MAX`; None for devices of this host.

    Raises:
        ValueError: more at least than at most.
    """
    if not text.startswith("ray"):
        return None
    least, _, most = text.removeprefix("ray").removeprefix(":").partition("-")
    if not least:
        return RayDevices(0, None)
    if most and int(least) > int(most):
        raise ValueError(f"{text}: at least {least} are more than at most {most}")
    return RayDevices(int(least), int(most or least))


DeviceNames = Annotated[str, AfterValidator(_checked)]


def _names_one_address(host: str) -> str:
    if parse_tcp_host(host) in ("0.0.0.0", "::", "[::]"):  # noqa: S104 - refused, not bound
        raise ValueError(f"{host} stands for every address of this machine; name the one that hosts reach it at")
    return parse_tcp_host(host)


class RaySettings(BaseModel):
    """How devices of a Ray cluster are reached."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(
        None,
        description="HOST:PORT of the cluster's head, or local for one of the server's own; by default "
        "RAY_ADDRESS, or a cluster that runs on this machine, or else one of its own",
    )
    host: Annotated[str, AfterValidator(_names_one_address)] | None = Field(
        None, description="address that actors reach this server at; by default this machine's, as Ray knows it"
    )
    port: int = Field(0, ge=0, le=65535, description="port for actors; 0 picks a free one")
    idle_s: float = Field(
        300.0, gt=0, description="seconds after which an unused device is given back, down to MIN of ray:MIN-MAX"
    )
    adapter_folder: Path | None = Field(
        None, description="folder on each host for adapters; by default one in its user's data folder"
    )
    adapter_bytes: ByteSize = Field(ByteSize(32 * 1024**3), description="room in that folder")
