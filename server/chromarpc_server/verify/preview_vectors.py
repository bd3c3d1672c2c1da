"""One folder of the trainer's vectors, and how far this machine is the one that recorded them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from chromarpc_server.verify.preview_layout import Kind, PreviewFolder
from chromarpc_server.verify.preview_models import CPU, Model, base_version, forward_once
from chromarpc_server.verify.vectors import Vectors


@dataclass(frozen=True)
class PreviewVectors:
    """A folder's vectors, and the device that they are compared on."""

    folder: Path
    kind: Kind
    device: torch.device

    @classmethod
    def of(cls, found: PreviewFolder, device: torch.device) -> PreviewVectors:
        """Vectors of a CPU are compared on a CPU, whatever else is there."""
        return cls(found.folder, found.kind, device if found.kind is Kind.GPU else CPU)

    def has(self, name: str) -> bool:
        """Whether the folder holds this file."""
        return (self.folder / f"{name}.safetensors").is_file()

    def read(self, name: str) -> Vectors:
        """The file of this name."""
        return Vectors.read(self.folder / f"{name}.safetensors")

    @cached_property
    def differs(self) -> str:
        """Empty where the exact form must equal the vectors bit for bit, else what differs here."""
        names = ("sampling", "text", "forward", "transformer")
        path = next(name for name in names if self.has(name))
        metadata = self.read(path).metadata
        recorded = metadata.get("torch", "")
        if base_version(recorded) != base_version(torch.__version__):
            return f"recorded with torch {recorded}, this is {torch.__version__}"
        if self.kind is Kind.GPU:
            gpu = metadata.get("gpu")
            if self.device.type != "cuda":
                return f"recorded on {gpu}, this is a CPU"
            here = torch.cuda.get_device_name(self.device)
            return "" if here == gpu else f"recorded on {gpu}, this is {here}"
        return self._compare_first_product()

    def _compare_first_product(self) -> str:
        """Whether this CPU sums a bf16 product in the order of the one that recorded."""
        if not self.has("forward"):
            return "no forward.safetensors tells whether this CPU sums in the same order"
        vectors, model = self.read("forward"), Model.read(self.folder)
        run_name = "qfloat8.bf16.1.0"
        if f"{run_name}.0.out" not in vectors.tensors:
            return "no recorded product tells whether this CPU sums in the same order"
        found = forward_once(vectors, model, run_name, "0", exact=True)
        same = torch.equal(found, vectors.tensors[f"{run_name}.0.out"])
        return "" if same else "this CPU sums a bf16 product in another order than the one that recorded"
