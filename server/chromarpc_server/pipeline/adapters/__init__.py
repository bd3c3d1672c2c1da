"""Adapters (LoRA and its relatives): files in, changes of named weights out.

`module_names` knows what modules are called, `kinds` what a change of one is made of, `keys` sorts a file's keys
by both, `change` is the common form with its arithmetic, `reader` puts them together for files that nobody
vouches for, `strength` measures what came out.
"""

from chromarpc_server.pipeline.adapters.keys import Unsupported, named, shown
from chromarpc_server.pipeline.adapters.reader import Adapter, read_adapter, require_adapter_file
from chromarpc_server.pipeline.adapters.strength import alphas_of, has_magnitude, squared_norm, value_count

__all__ = [
    "Adapter",
    "Unsupported",
    "alphas_of",
    "has_magnitude",
    "named",
    "read_adapter",
    "require_adapter_file",
    "shown",
    "squared_norm",
    "value_count",
]
