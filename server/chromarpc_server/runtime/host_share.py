"""What all devices of a process have in common on their host, each part safe for any thread."""

from __future__ import annotations

from dataclasses import dataclass

from chromarpc_server.domain.limits import Budgets
from chromarpc_server.pipeline import WeightFiles
from chromarpc_server.runtime.adapter_cache import AdapterCache


@dataclass(frozen=True)
class HostShare:
    """One for all devices of a process: what it holds is read and parsed once, and lies in host memory once."""

    adapters: AdapterCache
    """Parsed files, within one budget."""
    weights: WeightFiles
    """Checkpoints' files, and what of them lies in the host's memory: as long as a device holds the checkpoint."""

    @classmethod
    def within(cls, budgets: Budgets) -> HostShare:
        """An empty one."""
        return cls(AdapterCache(budgets.adapter_bytes), WeightFiles())
