"""How trainers spell a change of one module: one small file for each kind, and this list of them.

Adding a kind is one file with a `KIND`, and its entry in `KINDS`.
"""

from chromarpc_server.pipeline.adapters.kinds import full, loha, lokr, lora
from chromarpc_server.pipeline.adapters.kinds.kind import Kind, KindError, Module

KINDS: tuple[Kind, ...] = (lora.KIND, lokr.KIND, loha.KIND, full.KIND)

__all__ = ["KINDS", "Kind", "KindError", "Module"]
