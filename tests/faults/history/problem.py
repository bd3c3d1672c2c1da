"""A promise that was broken."""

from __future__ import annotations

from dataclasses import dataclass

LOST = frozenset({"lost", "unsettled"})
DOUBLED = frozenset({"one_end", "doubled", "request_id"})


@dataclass(frozen=True)
class Problem:
    """What was broken, and where it can be seen."""

    rule: str
    text: str
    job_id: str = ""
    calls: tuple[int, ...] = ()
    """Numbers of the calls that show it."""

    @property
    def count_as(self) -> str:
        """`lost`, `doubled` or `wrong`."""
        if self.rule in LOST:
            return "lost"
        return "doubled" if self.rule in DOUBLED else "wrong"
