"""What the commands need beyond the light install; knows the standard library only.

Looked for before anything of it is imported, so that `pip install chromarpc` answers in a sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

MAX_SHOWN = 4
SETTINGS = ("pydantic", "pydantic_settings")
SERVER = (
    *SETTINGS,
    "cryptography",
    "diffusers",
    "filelock",
    "gguf",
    "grpc_reflection",
    "httpcore2",
    "httpx2",
    "huggingface_hub",
    "numpy",
    "prometheus_client",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
)
"""Modules of the extra `chromarpc[server]` without which no server starts."""
VERIFY = ("diffusers", "gguf", "numpy", "safetensors", "scipy", "tokenizers", "torch", "transformers")
FETCH = ("huggingface_hub", *VERIFY)
TOKEN = ("pydantic",)
STORE = (*SETTINGS, "filelock")
RAY = ("ray",)


class NotInstalled(Exception):
    """Modules are missing; the message is one line and says what installs them."""

    def __init__(self, modules: Sequence[str], extra: str = "server") -> None:
        shown = [*modules] if len(modules) <= MAX_SHOWN else [*modules[: MAX_SHOWN - 1], "more"]
        listed = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
        verb = "are" if len(modules) > 1 else "is"
        super().__init__(f'{listed} {verb} not installed: pip install "chromarpc[{extra}]"')


def require(modules: Sequence[str], extra: str = "server") -> None:
    """Looks for modules and imports none of them.

    Args:
        modules: what is needed.
        extra: what installs them, as in `chromarpc[server]`.

    Raises:
        NotInstalled: some are not there.
    """
    missing = [module for module in modules if not _is_there(module)]
    if missing:
        raise NotInstalled(missing, extra)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # a finder that refuses
        return False
    except ValueError:  # imported already, and by no finder
        return True
