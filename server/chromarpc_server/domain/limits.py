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


@dataclass(frozen=True)
class UploadLimits:
    """What uploads of adapters may take."""

    max_file_bytes: int = 4 * 1024**3
    """Of one adapter; 0 takes none."""
    max_total_bytes: int = 32 * 1024**3
    """Of uploaded adapters, and of what unfinished uploads will become."""
    max_chunk_bytes: int = 1024**2
    max_open: int = 8
    """Unfinished uploads."""
    expiry_s: float = 3600.0
    """Without bytes, after which an unfinished upload is dropped."""
