"""Results of a verification: one line for each case, and a summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TextIO

from torch import Tensor


class Outcome(StrEnum):
    """How a case ended."""

    PASS = "PASS"  # noqa: S105 - not a password
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Result:
    """One case."""

    case: str
    outcome: Outcome
    rel: float | None = None
    """‖a − b‖ / ‖b‖ over the whole tensor."""
    max_abs: float | None = None
    tolerance: str = ""
    note: str = ""

    def line(self) -> str:
        """For people."""
        numbers = ""
        if self.rel is not None:
            numbers += f"  rel {self.rel:.3g}"
        if self.max_abs is not None:
            numbers += f"  max {self.max_abs:.3g}"
        if self.tolerance:
            numbers += f"  (tolerance {self.tolerance})"
        note = f"  {self.note}" if self.note else ""
        return f"{self.outcome.value}  {self.case}{numbers}{note}"


def distance(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """‖a − b‖ / ‖b‖ and max |a − b|, in float64; infinite where anything is NaN or shapes differ."""
    if found.shape != expected.shape:
        return math.inf, math.inf
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    difference = a - b
    norm = float(b.norm())
    rel = float(difference.norm()) / norm if norm else float(difference.norm())
    max_abs = float(difference.abs().max()) if difference.numel() else 0.0
    return (math.inf if math.isnan(rel) else rel), (math.inf if math.isnan(max_abs) else max_abs)


def within(case: str, found: Tensor, expected: Tensor, rel_tolerance: float, note: str = "") -> Result:
    """Passes where the relative error is at most the tolerance."""
    rel, max_abs = distance(found, expected)
    outcome = Outcome.PASS if rel <= rel_tolerance else Outcome.FAIL
    return Result(case, outcome, rel, max_abs, f"rel {rel_tolerance:g}", note)


def within_abs(case: str, found: Tensor, expected: Tensor, tolerance: float) -> Result:
    """Passes where no element is further off than the tolerance."""
    rel, max_abs = distance(found, expected)
    outcome = Outcome.PASS if max_abs <= tolerance else Outcome.FAIL
    return Result(case, outcome, rel, max_abs, f"max {tolerance:g}")


def identical(case: str, found: Tensor, expected: Tensor, note: str = "") -> Result:
    """Passes where every bit agrees."""
    rel, max_abs = distance(found.float(), expected.float())
    same = found.shape == expected.shape and found.dtype == expected.dtype and rel == 0 and max_abs == 0
    return Result(case, Outcome.PASS if same else Outcome.FAIL, rel, max_abs, "exact", note)


def skipped(case: str, reason: str) -> Result:
    """A case that was not run, and why."""
    return Result(case, Outcome.SKIP, note=reason)


class Reporter:
    """Collects results and prints them as they come."""

    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        self._out = out
        self._as_json = as_json
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        """Takes one result."""
        self.results.append(result)
        if not self._as_json:
            print(result.line(), file=self._out, flush=True)

    def guarded(self, case: str, run: Callable[[], object]) -> None:
        """Runs a case; an exception is its failure, reported in one line."""
        try:
            run()
        except Exception as error:  # noqa: BLE001 - whatever a foreign file provokes is this case's failure
            text = str(error).splitlines()[0][:200] if str(error) else ""
            self.add(Result(case, Outcome.FAIL, note=f"{type(error).__name__}: {text}"))

    def finish(self, environment: dict[str, str]) -> int:
        """Prints the summary. Returns 0 if something ran and nothing failed, else 1."""
        count = {outcome: sum(r.outcome is outcome for r in self.results) for outcome in Outcome}
        ok = count[Outcome.FAIL] == 0 and count[Outcome.PASS] > 0
        if self._as_json:
            body = {
                "ok": ok,
                "environment": environment,
                "summary": {outcome.value.lower(): number for outcome, number in count.items()},
                "cases": [
                    {key: _plain(value) for key, value in asdict(result).items()} for result in self.results
                ],
            }
            print(json.dumps(body, indent=1), file=self._out)
        else:
            where = ", ".join(f"{key} {value}" for key, value in environment.items())
            print(
                f"{count[Outcome.PASS]} passed, {count[Outcome.FAIL]} failed, {count[Outcome.SKIP]} skipped"
                f"  ({where})",
                file=self._out,
            )
            if not ok and count[Outcome.FAIL] == 0:
                why = (
                    "every case was skipped"
                    if self.results
                    else "the folder holds no known vectors; it should be laid out like tests/goldens"
                )
                print(f"nothing was verified: {why}", file=self._out)
        return 0 if ok else 1


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
