"""Limits of the service itself, beside those of the reference's schema."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused, naming the field."""

    max_prompts: int = 64
    max_prompt_bytes: int = 64 * 1024
    """UTF-8 bytes of one prompt after `[trigger]` is replaced."""
    max_loras: int = 8
    max_pixel_steps: int = 2**31
    """Width × height × steps, summed over the prompts."""
    max_pixels: int = 2**27
    """Width × height, summed over the prompts: bounds what a job's finished images can weigh."""
    max_queued_jobs: int = 32
    max_request_bytes: int = 8 * 1024 * 1024
