"""The settings below `limits`: what one request may ask for, one caller may have, and all callers together."""

from __future__ import annotations

from dataclasses import fields

from pydantic import BaseModel, ByteSize, ConfigDict, Field, PositiveInt

from chromarpc_server.domain.limits import CallerLimits, Limits

_LIMITS = Limits()
_CALLER = CallerLimits()


class LimitSettings(BaseModel):
    """What one request may ask for, one caller may have, and all callers together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_prompts: PositiveInt = Field(_LIMITS.max_prompts, description="prompts in one request")
    max_prompt_bytes: PositiveInt = Field(
        _LIMITS.max_prompt_bytes, description="UTF-8 bytes of one prompt after [trigger] is replaced"
    )
    max_loras: PositiveInt = Field(_LIMITS.max_loras, description="adapters in one request")
    max_pixel_steps: PositiveInt = Field(
        _LIMITS.max_pixel_steps,
        description="width × height × calls of the model, summed over a request's prompts",
    )
    max_pixels: PositiveInt = Field(
        _LIMITS.max_pixels, description="width × height, summed over a request's prompts"
    )
    max_queued_jobs: PositiveInt = Field(_LIMITS.max_queued_jobs, description="jobs waiting at once")
    max_request_bytes: PositiveInt = Field(_LIMITS.max_request_bytes, description="bytes of one request message")
    max_streams: PositiveInt = Field(_LIMITS.max_streams, description="calls in progress at once, of all callers")
    max_streams_per_caller: PositiveInt = Field(
        _CALLER.max_streams, description="calls in progress at once, of one caller"
    )
    max_queued_jobs_per_caller: PositiveInt = Field(
        _CALLER.max_queued_jobs, description="jobs of one caller waiting at once"
    )
    max_upload_bytes_per_caller: ByteSize = Field(
        ByteSize(_CALLER.max_upload_bytes), description="bytes of one caller's uploaded adapters together"
    )
    max_calls_per_minute_per_caller: PositiveInt = Field(
        _CALLER.max_calls_per_minute, description="calls begun in a minute by one caller"
    )
    max_calls_per_minute_per_peer: PositiveInt = Field(
        _LIMITS.max_calls_per_minute_per_peer,
        description="calls begun in a minute from one address, which may be that of a proxy",
    )
    max_connections: PositiveInt = Field(4096, description="connections at once")

    def limits(self) -> Limits:
        """Those of requests and of all callers together."""
        return Limits(**{item.name: getattr(self, item.name) for item in fields(Limits)})

    def caller_limits(self) -> CallerLimits:
        """Those of callers that the callers file gives no others."""
        return CallerLimits(
            max_streams=self.max_streams_per_caller,
            max_queued_jobs=self.max_queued_jobs_per_caller,
            max_pixel_steps=self.max_pixel_steps,
            max_upload_bytes=self.max_upload_bytes_per_caller,
            max_calls_per_minute=self.max_calls_per_minute_per_caller,
        )
