"""What is taken from diffusers and transformers, imported when first needed.

The two take as long to import as a full-size checkpoint takes to be read. A server begins with `import_ahead`, and
reads weights meanwhile.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from torch import Tensor
    from transformers import T5Config, T5EncoderModel

_ONE_IMPORTER = threading.Lock()
"""Two threads that import modules which import each other may see half of them."""
ONE_BUILDER = threading.Lock()
"""To be held while a model is constructed: transformers puts functions of its own in the place of torch's
initializers for as long, and two threads would leave them there."""


@dataclass(frozen=True)
class Libraries:
    """Classes that the pipeline builds, and a function."""

    autoencoder: type[AutoencoderKL]
    convert_autoencoder: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor | None]]
    """An autoencoder's tensors from the original layout to diffusers', given the config that diffusers has."""
    scheduler: type[FlowMatchEulerDiscreteScheduler]
    t5_config: type[T5Config]
    t5_encoder: type[T5EncoderModel]


def libraries() -> Libraries:
    """The classes; waits where they are being imported."""
    with _ONE_IMPORTER:
        return _import()


@cache
def gguf_functions() -> Mapping[int, Callable[..., Tensor]]:
    """Diffusers' dequantization of blocks, by GGUF's number of the type, in torch on any device."""
    libraries()
    with _ONE_IMPORTER:
        from diffusers.quantizers.gguf.utils import dequantize_functions  # noqa: PLC0415

    found: Mapping[int, Callable[..., Tensor]] = dequantize_functions
    return found


def import_ahead() -> None:
    """Begins to import them, in a thread of its own."""
    threading.Thread(target=_import_quietly, name="imports").start()


def _import_quietly() -> None:
    # Whoever needs them meets the same error; a server that ends before should say why, and not this.
    with suppress(Exception):
        libraries()


@cache
def _import() -> Libraries:
    for noisy in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
        # diffusers imports torchao, which complains about kernels this package does not use.
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with _uncollected():
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler  # noqa: PLC0415
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint  # noqa: PLC0415
        from transformers import T5Config, T5EncoderModel  # noqa: PLC0415

    return Libraries(
        AutoencoderKL, convert_ldm_vae_checkpoint, FlowMatchEulerDiscreteScheduler, T5Config, T5EncoderModel
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: what is imported stays, and looking for more takes a sixth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
