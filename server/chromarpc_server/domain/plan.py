"""A plan: a request with nothing left open. Made by `resolve`, never changed afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field

from chromarpc_server.domain.adapter_urls import is_url
from chromarpc_server.domain.requests import ImageFormat, NoiseDraw
from chromarpc_server.domain.sampling_choices import FLOWMATCH, SAMPLERS, DrawingSettings, has_guidance
from chromarpc_server.domain.trainer import TrainerSettings


@dataclass(frozen=True)
class PlanWarning:
    """Something the caller should know that does not stop the job."""

    code: str
    """A `WarningCode`; a stored plan keeps the text, which another version may know."""
    field: str
    """Dotted path, such as `prompts.0.width`; may be empty."""
    message: str


@dataclass(frozen=True)
class PlannedPrompt:
    """One image to draw."""

    prompt: str = field(repr=False)
    """After `[trigger]` was replaced."""
    width: int
    """Pixels, a multiple of the profile's divisor."""
    height: int
    """Pixels, a multiple of the profile's divisor."""
    sample_steps: int
    guidance_scale: float
    seed: int
    neg: str = field(default="", repr=False)
    """The unconditional text."""
    sampler: str = FLOWMATCH
    schedule: str = FLOWMATCH
    shift: float | None = None
    """Fixed shift of the schedule; None: the schedule's own."""

    @property
    def pixels_per_step(self) -> int:
        """Width × height × calls of the model: what a step's work is roughly proportional to."""
        return self.width * self.height * self.calls_per_step

    @property
    def calls_per_step(self) -> int:
        """How often a step calls the model, at most."""
        choice = SAMPLERS.get(self.sampler)  # a stored plan may name one of another version
        return 1 if choice is None else choice.calls_per_step

    @property
    def pixel_steps(self) -> int:
        """The same over all steps."""
        return self.pixels_per_step * self.sample_steps


@dataclass(frozen=True)
class PlannedLora:
    """One adapter: a path below the adapter root, `sha256:` and a hash, or an http(s) URL."""

    path: str
    network_multiplier: float
    expected_sha256: str | None = None
    """What the file must be, 64 lower-case hexadecimal digits; None where the request does not say."""

    @property
    def is_url(self) -> bool:
        """Whether it has to be fetched."""
        return is_url(self.path)


@dataclass(frozen=True)
class PlannedOutput:
    """How images are encoded."""

    format: ImageFormat
    quality: int
    """1 to 100; without meaning for PNG."""
    picture_record: bool = False
    """Whether each image carries what it was drawn with; not those of jobs that older versions stored."""


@dataclass(frozen=True)
class PlannedPreview:
    """When previews are sent."""

    every_n_steps: int
    max_side_px: int


@dataclass(frozen=True)
class Plan:
    """Everything that decides the images, and how they are delivered."""

    model: str
    """Id that was asked for."""
    served_model: str
    """Id of the model that computes: another one where the server has an alias."""
    profile: str
    noise_draw: NoiseDraw
    prompts: tuple[PlannedPrompt, ...]
    loras: tuple[PlannedLora, ...]
    output: PlannedOutput
    preview: PlannedPreview | None
    warnings: tuple[PlanWarning, ...]
    request_id: str | None = None
    """Under which the request may be repeated."""
    detached: bool = False
    """Whether the job goes on when nobody is attached to it."""
    may_return: bool = False
    """Whether a caller that went away may come back within a while before the job is ended."""
    max_queue_s: float | None = None
    """How long it may wait."""
    trainer: TrainerSettings | None = None
    """What the trainer's config decides; None outside the preview profiles."""
    settings: DrawingSettings = DrawingSettings.REFERENCE
    """Whose way of drawing is followed."""

    def has_guidance(self, prompt: PlannedPrompt) -> bool:
        """Whether each of the prompt's steps makes an unconditional pass, too."""
        return has_guidance(prompt.guidance_scale, self.settings)

    @property
    def pixel_steps(self) -> int:
        """Width × height × calls of the model over all prompts."""
        return sum(prompt.pixel_steps for prompt in self.prompts)
