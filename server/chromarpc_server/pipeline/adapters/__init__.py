"""Adapters (LoRA and its relatives): files in, changes of named weights out.

`module_names` knows what modules are called, `kinds` what a change of one is made of, `keys` sorts a file's keys
by both, `change` is the common form with its arithmetic, `reader` puts them together for files that nobody
vouches for.
"""

from chromarpc_server.pipeline.adapters.keys import Unsupported
from chromarpc_server.pipeline.adapters.reader import Adapter, read_adapter

__all__ = ["Adapter", "Unsupported", "read_adapter"]
