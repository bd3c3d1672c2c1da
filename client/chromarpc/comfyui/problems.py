"""What of a workflow cannot be a request, named by node and input.

`WorkflowError`, a `ValueError`, is `NoWorkflow` where a file holds none that can be read, and `WorkflowNotMapped`
where it does and something in it cannot be a request. `Findings` collects while a workflow is followed, so that
all is told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, ParamSpec, TypeVar

MAX_PROBLEMS: Final = 50
"""How many are named; a hostile workflow may have thousands."""
_MAX_NAME: Final = 80

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Problem:
    """Something of a workflow that no request can hold."""

    node_id: str
    """Empty where it is about the workflow as a whole."""
    class_type: str
    """Of the node, such as `KSampler`."""
    input: str
    """Of the node, such as `denoise`; empty where it is the node itself."""
    reason: str
    """A part of a sentence for people: why, and where there is one, a way around it."""

    def __str__(self) -> str:
        if not self.node_id:
            return self.reason
        at = f", {cut(self.input)}" if self.input else ""
        return f"node {cut(self.node_id)} ({cut(self.class_type)}){at}: {self.reason}"


class WorkflowError(ValueError):
    """A workflow that cannot be drawn."""


class NoWorkflow(WorkflowError):
    """A file that holds no workflow, or none that can be read here; a sentence for people."""


class WorkflowNotMapped(WorkflowError):
    """A workflow of which something cannot be a request.

    Attributes:
        problems: all that was found, at most 50.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(["the workflow cannot be drawn here:", *(f"  {one}" for one in problems)]))


class Unmapped(Exception):
    """Ends the mapping of one part; `Findings.attempt` keeps its problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Findings:
    """Problems and remarks so far."""

    def __init__(self, given: Collection[str] = ()) -> None:
        """`given`: names of the request's fields that the caller says, so that nobody reads them here."""
        self.given = frozenset(given)
        self.problems: list[Problem] = []
        self.remarks: list[str] = []

    def refuse(self, problem: Problem) -> None:
        """Keeps a problem, once."""
        if problem not in self.problems and len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def remark(self, text: str) -> None:
        """Keeps a sentence on what was left out without harm, once."""
        if text not in self.remarks and len(self.remarks) < MAX_PROBLEMS:
            self.remarks.append(text)

    def read(self, field: str, part: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        """The same as `attempt` for what says one of the request's fields; None where the caller says that."""
        return None if field in self.given else self.attempt(part, *args, **kwargs)

    def attempt(self, part: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R | None:
        """What a part gives; None where it cannot be mapped, which is kept."""
        try:
            return part(*args, **kwargs)
        except Unmapped as error:
            self.refuse(error.problem)
            return None


def cut(text: str) -> str:
    """A name out of a file, short enough to print, and on one line."""
    short = text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}…"
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in short)
