"""What `--devices` may say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

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
