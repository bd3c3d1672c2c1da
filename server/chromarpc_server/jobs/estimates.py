"""How long jobs will take, learned from the steps that were measured."""

from __future__ import annotations

from chromarpc_server.domain.plan import Plan


class StepTimes:
    """Seconds for each pixel × call of the model, by (device's model, model, profile), as a moving average."""

    _WEIGHT = 0.2

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str, str], float] = {}

    def observe(self, device: str, model: str, profile: str, pixel_steps: int, duration_s: float) -> None:
        """Takes in one step of so many pixels × calls of the model, measured on a device of this model."""
        key = (device, model, profile)
        measured = duration_s / pixel_steps
        before = self._seconds.get(key, measured)
        self._seconds[key] = before + self._WEIGHT * (measured - before)

    def estimate_s(self, device: str, model: str, profile: str, pixel_steps: int) -> float | None:
        """Seconds that `pixel_steps` will probably take on a device of this model; None while nothing was
        measured.
        """
        rate = self._seconds.get((device, model, profile))
        return None if rate is None else rate * pixel_steps


def stored_bytes(plan: Plan) -> int:
    """What a job may take on the disk, at most: its images as if nothing in them could be compressed, its events
    and its plan.
    """
    pixels = sum(prompt.width * prompt.height for prompt in plan.prompts)
    text = sum(len(prompt.prompt) + len(prompt.neg) for prompt in plan.prompts)
    return 3 * pixels + 8 * text + 64 * 1024 * len(plan.prompts) + 256 * 1024
