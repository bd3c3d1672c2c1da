"""The `prepared` event and its warnings, made once adapters are read and prompts are tokenized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from chromarpc_server.adapters.warnings import adapter_warnings
from chromarpc_server.domain.devices import DeviceDescription
from chromarpc_server.domain.events import AdapterPlacement, AdapterReport, Prepared, TokenCount, WeightsReport
from chromarpc_server.domain.fallbacks import DeviceFallback
from chromarpc_server.domain.plan import Plan, PlanWarning
from chromarpc_server.domain.sampling_choices import DrawingSettings
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.pipeline import Adapter, SamplingChoice, TokenizedPrompt, image_tokens, lies_beside


def prepared_event(
    plan: Plan,
    adapters: Sequence[tuple[Adapter, float]],
    tokenized: Sequence[TokenizedPrompt],
    negative: Sequence[TokenizedPrompt | None],
    *,
    model_revision: str,
    stored_as: str,
    versions: Mapping[str, str],
    device: DeviceDescription,
    weights: WeightsReport,
    base_name: str = "",
    tiled_beyond_px: int | None = None,
    fallbacks: Sequence[DeviceFallback] = (),
    left_out: str = "",
    rounded: bool = True,
) -> Prepared:
    """The event, with everything about files and tokens that the plan could not know.

    Args:
        negative: the negative prompts, None for those that are empty.
        stored_as: what most of the checkpoint's transformer is stored as.
        device: what computes.
        base_name: what adapters for the model name as their base.
        tiled_beyond_px: longer sides than this are decoded in tiles.
        fallbacks: what the device does without.
        left_out: what the model's files hold and the model does not have; empty where there is nothing.
        rounded: whether weights were rounded to float8.
    """
    return Prepared(
        adapters=tuple(
            AdapterReport(
                path=lora.path,
                sha256=adapter.sha256,
                format=adapter.format,
                network_multiplier=multiplier,
                rank=adapter.rank,
                matched_keys=len(adapter.matched),
                unmatched_keys=adapter.unmatched,
                metadata=adapter.metadata,
                placement=_placement(plan, adapter),
            )
            for lora, (adapter, multiplier) in zip(plan.loras, adapters, strict=True)
        ),
        model_revision=model_revision,
        stored_as=stored_as,
        token_counts=tuple(TokenCount(tokens.token_count, tokens.cut_count) for tokens in tokenized),
        versions=versions,
        device=device.name,
        device_id=device.id,
        second_device=device.second,
        weights=weights,
        warnings=(
            *_prompt_warnings(tokenized, "prompt"),
            *_prompt_warnings(negative, "neg"),
            *(
                warning
                for index, (adapter, _) in enumerate(adapters)
                for warning in adapter_warnings(adapter, f"loras.{index}.path", base_name)
            ),
            *_steps_warnings(plan),
            *_rounding_warnings(plan, rounded),
            *_tiling_warnings(plan, tiled_beyond_px),
            *(PlanWarning(WarningCode.DEVICE_FALLBACK, "", fallback.message) for fallback in fallbacks),
            *_left_out_warnings(left_out),
        ),
    )


def _placement(plan: Plan, adapter: Adapter) -> AdapterPlacement:
    """Where an adapter's changes are; merged where any of them had to be."""
    beside = plan.trainer is not None and lies_beside(adapter, plan.trainer)
    return AdapterPlacement.BESIDE if beside else AdapterPlacement.MERGED


def _prompt_warnings(tokenized: Sequence[TokenizedPrompt | None], field: str) -> Iterator[PlanWarning]:
    for index, tokens in enumerate(tokenized):
        if tokens is not None and tokens.cut_count:
            yield PlanWarning(
                WarningCode.PROMPT_TRUNCATED,
                f"prompts.{index}.{field}",
                f"{tokens.cut_count} tokens were cut off: the model reads {tokens.token_count}, with the end mark",
            )


def _steps_warnings(plan: Plan) -> Iterator[PlanWarning]:
    for index, prompt in enumerate(plan.prompts):
        choice = SamplingChoice(prompt.sampler, prompt.schedule, prompt.shift, plan.settings)
        count = len(choice.sigmas(prompt.sample_steps, image_tokens(prompt.width, prompt.height))) - 1
        if count != prompt.sample_steps:
            yield PlanWarning(
                WarningCode.STEPS_DIFFER,
                f"prompts.{index}.sample_steps",
                f"the schedule {prompt.schedule} makes {count} steps of {prompt.sample_steps}",
            )


def _rounding_warnings(plan: Plan, rounded: bool) -> Iterator[PlanWarning]:
    if rounded and plan.settings is DrawingSettings.COMFYUI:
        why = "the profile multiplies in float8" if plan.profile == "fp8" else "the device has room for no others"
        yield PlanWarning(
            WarningCode.SETTINGS_ROUNDED,
            "settings",
            f"the weights are rounded to float8, which ComfyUI does not do: {why}",
        )


def _tiling_warnings(plan: Plan, beyond_px: int | None) -> Iterator[PlanWarning]:
    for index, prompt in enumerate(plan.prompts):
        if beyond_px is not None and max(prompt.width, prompt.height) > beyond_px:
            yield PlanWarning(
                WarningCode.IMAGE_TILED,
                f"prompts.{index}",
                "the device is short of memory: the image is decoded in tiles, which changes pixels a little",
            )


def _left_out_warnings(left_out: str) -> Iterator[PlanWarning]:
    if left_out:
        yield PlanWarning(WarningCode.BASE_PARTS_DROPPED, "model", f"the model's files hold more: {left_out}")
