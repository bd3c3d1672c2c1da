"""What is wrong with a request, and what its sender should know, gathered while it is read."""

from __future__ import annotations

from dataclasses import dataclass, field

from chromarpc_server.domain.errors import FieldViolation, InvalidParameter, first_named
from chromarpc_server.domain.plan import PlanWarning
from chromarpc_server.domain.requests import RANGES
from chromarpc_server.domain.warning_codes import WarningCode


@dataclass
class Findings:
    """What was found so far."""

    violations: list[FieldViolation] = field(default_factory=list)
    warnings: list[PlanWarning] = field(default_factory=list)

    def refuse(self, path: str, description: str) -> None:
        """The request cannot be served, because of this field."""
        self.violations.append(FieldViolation(path, description))

    def warn(self, code: WarningCode, path: str, message: str) -> None:
        """The request can be served, and its sender should know."""
        self.warnings.append(PlanWarning(code, path, message))

    def in_range(self, path: str, value: float, allowed: tuple[float, float] | None = None) -> None:
        """Refuses what lies outside, and what is no number.

        Args:
            path: of the field.
            value: what the request says.
            allowed: both ends; by default those of `RANGES`.
        """
        low, high = allowed or RANGES[".".join(part for part in path.split(".") if not part.isdecimal())]
        if not low <= value <= high:  # NaN fails both comparisons
            self.refuse(path, f"must be between {low} and {high}, got {value}")

    def raise_if_any(self) -> None:
        """Ends the reading of a request that cannot be served.

        Raises:
            InvalidParameter: with every violation so far.
        """
        if self.violations:
            fields = first_named([violation.field for violation in self.violations])
            raise InvalidParameter(f"invalid request: {fields}", violations=self.violations)
