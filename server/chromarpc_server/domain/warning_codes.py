"""The one table of warnings: what a job's or an adapter's warning is about, and what to do about it.

`tools/code_tables.py` writes the enum `WarningCode` of the contract and the table of docs/api.md from it. To add a
warning: add a member with the next free number here, and run `make protos`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class WarningCode(StrEnum):
    """A warning's stable name; a stored plan may hold one that only another version knows."""

    number: int
    """In the contract's enum; never changed, never used again."""
    when: str
    """A sentence for people."""
    caller: str
    """What the caller does about it; empty where there is nothing to do."""

    def __new__(cls, code: str, number: int, when: str, caller: str = "") -> Self:
        """A code and what there is to know of it."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.number = number
        member.when = when
        member.caller = caller
        return member

    # fmt: off
    MODEL_ALIASED = (
        "MODEL_ALIASED", 1,
        "Another model serves this id on this server.",
        "Check `served_model`.",
    )
    SIZE_SNAPPED = (
        "SIZE_SNAPPED", 2,
        "A width or height was floored, or raised to the least there is, as the profile that is named does.",
        "Ask for a multiple of the profile's `resolution_divisor`.",
    )
    PICTURE_RECORD_LEFT_OUT = (
        "PICTURE_RECORD_LEFT_OUT", 3,
        "Images carry no record: the server writes none, or keeps images and no prompts.",
        "Keep the request yourself.",
    )
    TRIGGER_WORD_UNUSED = (
        "TRIGGER_WORD_UNUSED", 4,
        "There is a trigger word, and no `[trigger]` that it would replace.",
        "Write `[trigger]` into the prompt.",
    )
    TRIGGER_NOT_REPLACED = (
        "TRIGGER_NOT_REPLACED", 5,
        "A prompt holds `[trigger]`, and there is no trigger word: it stays as written.",
        "Give a `trigger_word`.",
    )
    NEG_IGNORED = (
        "NEG_IGNORED", 6,
        "The negative prompt has no effect in the profile that is named, unless the request says `use_neg`.",
        "Set `use_neg`, or leave it out.",
    )
    NEG_WITHOUT_GUIDANCE = (
        "NEG_WITHOUT_GUIDANCE", 7,
        "The negative prompt has no effect, because guidance of 1 (and less, but as ComfyUI) makes a single pass.",
        "Raise `guidance_scale`, or leave it out.",
    )
    TRAINER_OPTIONS_IGNORED = (
        "TRAINER_OPTIONS_IGNORED", 8,
        "An option of `trainer` has no effect in the profile that is named, or beside the request's others.",
        "Use a preview profile, or leave it out.",
    )
    FPS_IGNORED = (
        "FPS_IGNORED", 9,
        "`fps` has no effect on an image.",
        "Leave it out.",
    )
    HF_TOKEN_UNUSED = (
        "HF_TOKEN_UNUSED", 10,
        "`hf_token` has no effect: no adapter of the request is fetched.",
        "Leave it out.",
    )
    UNKNOWN_FIELD = (
        "UNKNOWN_FIELD", 11,
        "This version of the server does not know the field, and left it out.",
        "Check its spelling, or the server's version.",
    )
    PREVIEW_OFF = (
        "PREVIEW_OFF", 12,
        "Options of previews have no effect, because previews are off.",
        "Set `preview.every_n_steps`.",
    )
    PREVIEW_NEVER = (
        "PREVIEW_NEVER", 13,
        "No image has enough steps for a preview.",
        "Lower `preview.every_n_steps`.",
    )
    PROMPT_TRUNCATED = (
        "PROMPT_TRUNCATED", 14,
        "The text encoder does not read all of a prompt; the message says how many tokens were cut.",
        "Shorten the prompt.",
    )
    IMAGE_TILED = (
        "IMAGE_TILED", 15,
        "The image is decoded in tiles, which changes pixels a little: memory is short, or `--tiling on` says so.",
    )
    PROMPTS_CUT = (
        "PROMPTS_CUT", 16,
        "The job is too large for one message: its prompts are shown shorter than they are drawn.",
    )
    DEVICE_FALLBACK = (
        "DEVICE_FALLBACK", 17,
        "The GPU does without something that makes it fast; the message and `GetServerInfo` say what, and why.",
        "Tell the operator.",
    )
    LORA_KEYS_UNMATCHED = (
        "LORA_KEYS_UNMATCHED", 18,
        "Keys of the adapter match nothing in the model, and change nothing.",
        "See which with `InspectLora`.",
    )
    LORA_PART_UNSUPPORTED = (
        "LORA_PART_UNSUPPORTED", 19,
        "Keys of the adapter are of a kind that the server does not apply; the message names it.",
        "Expect an image without them.",
    )
    LORA_FOR_ANOTHER_MODEL = (
        "LORA_FOR_ANOTHER_MODEL", 20,
        "The adapter's header names another model than Chroma.",
        "Use an adapter for Chroma.",
    )
    LORA_WITHOUT_EFFECT = (
        "LORA_WITHOUT_EFFECT", 21,
        "Every change of the adapter is zero, as in a file that was never trained.",
        "Check the training run.",
    )
    LORA_ALPHA_NOT_FINITE = (
        "LORA_ALPHA_NOT_FINITE", 22,
        "Alphas of the adapter are not finite numbers, and do not count here.",
        "Export the file again; other programs may use them.",
    )
    LORA_SCALE_UNREAD = (
        "LORA_SCALE_UNREAD", 23,
        "The adapter's header gives scales that the server cannot follow, so it may be too strong or too weak.",
        "Adjust `network_multiplier`.",
    )
    LORA_FOR_ANOTHER_BASE = (
        "LORA_FOR_ANOTHER_BASE", 24,
        "The adapter's header names another checkpoint of Chroma than the model that draws.",
        "Use the model that it was trained on, or expect a weaker likeness.",
    )
    SCHEDULE_UNUSUAL = (
        "SCHEDULE_UNUSUAL", 25,
        "The schedule was made for other kinds of models: most of its steps fall where little noise is left.",
        "Use another schedule, such as `simple` or `beta`.",
    )
    STEPS_DIFFER = (
        "STEPS_DIFFER", 26,
        "The schedule has another number of steps than `sample_steps` says, as in ComfyUI.",
    )
    SHIFT_IGNORED = (
        "SHIFT_IGNORED", 27,
        "`shift` has no effect on the schedule that is named.",
        "Leave it out, or use another schedule.",
    )
    BASE_PARTS_DROPPED = (
        "BASE_PARTS_DROPPED", 28,
        "A file of the model holds more than the model has, such as a text encoder's decoder; it is left out.",
    )
    SETTINGS_ROUNDED = (
        "SETTINGS_ROUNDED", 29,
        "With the settings `comfyui` weights were rounded to float8 all the same; the message says why.",
        "Use the profile `reference` on a GPU with room for weights that are not rounded.",
    )
    # fmt: on
