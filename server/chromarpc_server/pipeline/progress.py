"""How a long piece of work reports how far it is, and how it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadProgress:
    """How far a stage of loading is."""

    stage: str
    """`reading`, `merging` or `quantizing`."""
    done_bytes: int
    total_bytes: int


Progress = Callable[[LoadProgress], None]
"""Called after each tensor."""
Check = Callable[[], None]
"""Called between tensors, or pieces of them; raises to stop."""


def never_stop() -> None:
    """The check of work that nobody stops."""


def _report_nothing(_: LoadProgress) -> None:
    """The progress of work that nobody waits for."""


@dataclass(frozen=True)
class LoadContext:
    """What accompanies a load from its caller down to the files: who may stop it, and who hears how far it is."""

    check: Check = never_stop
    progress: Progress = _report_nothing


SILENT = LoadContext()
"""Of a load that nobody waits for: nothing stops it, and it reports to nobody."""
