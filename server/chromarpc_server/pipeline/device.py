"""The device that computes: choosing, describing, measuring it, and making sense of its errors."""

from __future__ import annotations

import logging
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.errors import DeviceLost, WeightsInvalid
from chromarpc_server.pipeline.memory_errors import translate_memory_error
from chromarpc_server.pipeline.profiles import served_profiles

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceChoice:
    """Where and in what to compute."""

    device: torch.device
    dtype: torch.dtype
    id: str = ""
    """Unique among a server's devices; the device's own where it is empty."""
    profiles: tuple[str, ...] = ()
    """Numerics profiles that it can compute, as far as an operator wants its dtype."""
    second: torch.device | None = None
    """The other card of a pair, which computes the unconditional pass."""

    @property
    def name(self) -> str:
        """What it is called in logs and to clients."""
        return self.id or str(self.device)

    @property
    def cards(self) -> tuple[torch.device, ...]:
        """The device, or both of a pair."""
        return (self.device,) if self.second is None else (self.device, self.second)


def choose_device(device: str, dtype: str, *, threads: int | None = None) -> DeviceChoice:
    """Reads the settings' words.

    Args:
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on a CPU, bfloat16 on a GPU), `float32` or `bfloat16`.
        threads: CPU threads; torch's own choice if None.

    Raises:
        WeightsInvalid: no such device.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise WeightsInvalid(f"no such device: {device}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise WeightsInvalid(f"device {device} is not supported; use cpu or cuda")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index or 0)
        if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
            raise WeightsInvalid(f"device {device} is not there: torch sees {torch.cuda.device_count()} GPUs")
    profiles = served_profiles(chosen, dtype)
    if dtype == "auto":
        dtype = "float32" if chosen.type == "cpu" else "bfloat16"
    computed = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return DeviceChoice(chosen, computed, profiles=profiles)


def choose_devices(
    devices: Sequence[str], dtype: str, *, threads: int | None = None, in_pairs: bool = False
) -> list[DeviceChoice]:
    """Reads the settings' words for several devices.

    Args:
        devices: `all` alone (every GPU that torch sees), or `cpu` and `cuda:N`, a CPU as often as wanted.
        dtype: as for `choose_device`.
        threads: CPU threads of each; None: torch's own choice, shared out evenly among CPUs.
        in_pairs: two after the other are one device, which makes both passes of guidance at the same time.

    Raises:
        WeightsInvalid: one is not there, is named twice, or has no equal one to go with.
    """
    if list(devices) == ["all"]:
        if not torch.cuda.is_available():
            raise WeightsInvalid("devices all: torch sees no GPU; name cpu to compute on this one")
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    cpus = devices.count("cpu")
    if threads is None and cpus > 1:
        threads = max(1, torch.get_num_threads() // cpus)
    choices: list[DeviceChoice] = []
    for device in devices:
        choice = choose_device(device, dtype, threads=threads)
        if choice.device.type == "cuda" and any(other.device == choice.device for other in choices):
            raise WeightsInvalid(f"device {choice.device} is named twice")
        same = sum(other.device == choice.device for other in choices)
        choices.append(replace(choice, id=f"cpu:{same}" if choice.device.type == "cpu" and cpus > 1 else ""))
    return _paired(choices) if in_pairs else choices


def _paired(choices: Sequence[DeviceChoice]) -> list[DeviceChoice]:
    names = ", ".join(choice.name for choice in choices)
    if len(choices) % 2:
        raise WeightsInvalid(f"cfg-parallel takes devices in pairs, and {names} are {len(choices)}")
    pairs = []
    for first, second in zip(choices[::2], choices[1::2], strict=True):
        models = [describe_device(choice).name for choice in (first, second)]
        if first.device.type != second.device.type or models[0] != models[1]:
            raise WeightsInvalid(
                f"cfg-parallel needs equal devices: {first.name} is {models[0]}, {second.name} is {models[1]}"
            )
        pairs.append(replace(first, id=f"{first.name}+{second.name}", second=second.device))
    return pairs


def idle_gpus(used: Sequence[DeviceChoice]) -> list[str]:
    """GPUs that torch sees and none of these uses, as `cuda:0`."""
    taken = {str(device) for choice in used for device in (choice.device, choice.second) if device is not None}
    every = [f"cuda:{index}" for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return [name for name in every if name not in taken]


def select_device(device: torch.device) -> None:
    """Makes a GPU the current one of the calling thread: whatever names none, such as an event, belongs to it.

    A `cuda` without an index is the current one already.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def cpu_threads() -> int:
    """How many threads a CPU computes with for the calling thread."""
    return torch.get_num_threads()


def compute_with(threads: int) -> None:
    """Has a CPU compute with so many threads for the calling thread.

    A thread that says nothing takes over what another one has at the moment when it first computes, which may be
    a number that holds for a while only.
    """
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """The same for a while, for code that does not know which thread it runs on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def describe_device(choice: DeviceChoice) -> DeviceDescription:
    """Name and memory of the device."""
    device = choice.device
    dtype = str(choice.dtype).removeprefix("torch.")
    name = model_name(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceDescription(
        choice.name,
        name,
        memory,
        dtype,
        profiles=choice.profiles,
        second="" if choice.second is None else str(choice.second),
    )


def model_name(device: torch.device) -> str:
    """Of a GPU or the processor. Devices of one model compute the same bits."""
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else _processor_name()


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def library_versions() -> Mapping[str, str]:
    """Versions of everything that the numbers depend on."""
    names = ("chromarpc", "diffusers", "safetensors", "tokenizers", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return {"python": platform.python_version(), "torch": torch.__version__, **found}


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Begins a new measurement of peak memory; a CPU's is the process's and cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use at once: the device's since the reset, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory_bytes(device: torch.device) -> int:
    """What the process holds now: of the device as torch's allocator counts it, or of the host on a CPU.

    Makes no call to the device, so any thread may ask.
    """
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return peak_memory_bytes(device)
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_memory_bytes(device: torch.device) -> int:
    """What can be allocated now, with what torch holds unused on a GPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def usable_memory_bytes(device: torch.device, limit: int | None) -> int:
    """What a checkpoint may take on a GPU: what is free, within the operator's limit, which torch enforces."""
    if limit is None:
        return free_memory_bytes(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return min(free_memory_bytes(device), limit - torch.cuda.memory_allocated(device))


def release_memory(device: torch.device) -> None:
    """Gives cached, unused memory back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def probe_device(device: torch.device) -> bool:
    """Has the device do a small sum and looks at what comes back. Returns whether its memory is full.

    A device that has no memory left for the sum, not even after what is unused was given back, is full and not
    lost: it said so itself.

    Raises:
        DeviceLost: it cannot, or its answer is wrong.
    """
    failure = _failed_sum(device)
    if failure is not None:
        # The runtime may report an earlier failure once more at the next call; a poisoned context fails them all.
        with suppress(Exception):
            release_memory(device)
        failure = _failed_sum(device)
    if failure is None:
        return False
    if translate_memory_error(failure) is None:
        raise DeviceLost("the device failed and cannot be used any more")
    log.warning("device.full", extra={"device": str(device)})
    return True


def _failed_sum(device: torch.device) -> Exception | None:
    """What went wrong with a small sum."""
    try:
        numbers = torch.arange(256, dtype=torch.float32, device=device)
        answer = float((numbers + 1).sum().item())
        synchronize(device)
    except Exception as error:  # noqa: BLE001 - whatever it is, the device does not work
        return error
    return None if answer == 256 * 257 / 2 else ArithmeticError(f"the sum came to {answer}")
