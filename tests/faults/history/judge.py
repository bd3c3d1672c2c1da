"""Reads a history for promises that were broken; knows no server, and asks nobody anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tests.faults.history.answers import ANSWER_RULES
from tests.faults.history.index import Index
from tests.faults.history.lives import LIFE_RULES
from tests.faults.history.making import MAKING_RULES
from tests.faults.history.problem import Problem
from tests.faults.history.recorded import History
from tests.faults.history.uploads import UPLOAD_RULES

_MOST_OPERATIONS = 80

Rule = Callable[[Index], Iterator[Problem]]
RULES: Sequence[Rule] = (*LIFE_RULES, *MAKING_RULES, *UPLOAD_RULES, *ANSWER_RULES)


def judge(history: History) -> tuple[Problem, ...]:
    """Every promise that was broken, once for each job."""
    index = Index(history)
    found: dict[tuple[str, str], Problem] = {}
    for rule in RULES:
        for problem in rule(index):
            found.setdefault((problem.rule, problem.job_id or problem.text), problem)
    return tuple(found.values())


def operations(index: Index, problem: Problem) -> list[str]:
    """What was done with a problem's job and happened meanwhile, in order, for people."""
    record = index.jobs.get(problem.job_id)
    history = index.history
    concerned = {call.number: call for call in history.calls if call.number in problem.calls}
    if record is not None:
        about = [*record.shown, *record.missing, *record.deletes, *record.cancels]
        about += index.made[record.owner, record.request_id] if record.request_id else []
        # Lists show every job; only those that show the problem tell anything.
        concerned |= {call.number: call for call in about if call.method != "ListJobs"}
    if not concerned:
        return []
    lines = [(call.begun_s, call.described()) for call in concerned.values()]
    first, last = min(lines)[0], max(lines)[0]
    lines += [(fault.begun_s, fault.described()) for fault in history.faults if first <= fault.begun_s <= last]
    lines.sort()
    return [line for _, line in lines[:_MOST_OPERATIONS]]
