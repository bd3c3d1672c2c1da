"""Models of a server's settings: `[models.NAME]` in the file, `--model NAME=FILE_OR_REPO[,key=value…]` by flag.

Also the sizes that models are warmed up for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import NoDecode

from chromarpc_server.domain.base_names import base_name_of, usual_defaults
from chromarpc_server.domain.models import (
    CHROMA,
    FILE_SUFFIXES,
    MODEL_ID,
    HubPart,
    LocalPart,
    ModelDefaults,
    ModelSpec,
    hub_part,
    trainer_file,
)
from chromarpc_server.domain.requests import RANGES
from chromarpc_server.domain.sampling_choices import LEAST_STEPS, SAMPLERS, SCHEDULES, SHIFT_RANGE

MAX_DESCRIPTION = 500


def _side(value: int) -> int:
    low, high = RANGES["prompts.width"]
    if not low <= value <= high:
        raise ValueError(f"must be between {low:g} and {high:g}, got {value}")
    if value % CHROMA.resolution_divisor:
        raise ValueError(f"must be a multiple of {CHROMA.resolution_divisor}, got {value}")
    return value


def _one_of(known: Mapping[str, object] | tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"no such name: {value}; known are {', '.join(known)}")
        return value

    return AfterValidator(check)


def _within(name: str) -> dict[str, Any]:
    low, high = RANGES[name]
    return {"ge": low, "le": high}


class ModelSettings(BaseModel):
    """One model. A part is a file, a folder, or `owner/name[:file or folder]` of the Hugging Face hub."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformer: str = Field(min_length=1)
    text_encoder: str | None = Field(None, min_length=1)
    tokenizer: str | None = Field(None, min_length=1)
    autoencoder: str | None = Field(None, min_length=1)
    base_name: str | None = None
    description: str | None = Field(None, max_length=MAX_DESCRIPTION)
    width: Annotated[int, AfterValidator(_side)] | None = None
    height: Annotated[int, AfterValidator(_side)] | None = None
    steps: int | None = Field(None, **_within("prompts.sample_steps"))
    guidance: float | None = Field(None, **_within("prompts.guidance_scale"))
    sampler: Annotated[str, _one_of(SAMPLERS)] | None = None
    schedule: Annotated[str, _one_of(SCHEDULES)] | None = None
    shift: float | None = Field(None, ge=SHIFT_RANGE[0], le=SHIFT_RANGE[1])
    profile: str | None = None


KEYS = tuple(ModelSettings.model_fields)


def model_spec(name: str, said: ModelSettings, *, must_exist: bool = True) -> ModelSpec:
    """The model that settings describe; what they leave out is as for the checkpoint that its name tells.

    Args:
        name: its id.
        said: what the settings say.
        must_exist: files and folders lie on this machine, and not only on a cluster's hosts.

    Raises:
        ValueError: naming the key at fault.
    """
    transformer = _source("transformer", said.transformer, must_exist=must_exist)
    if isinstance(transformer, HubPart) and not transformer.path:
        transformer = HubPart(transformer.repo, trainer_file(transformer.repo))
    others = {
        key: None if value is None else _source(key, value, must_exist=must_exist)
        for key in ("text_encoder", "tokenizer", "autoencoder")
        for value in [getattr(said, key)]
    }
    base_name = said.base_name
    if base_name is None:
        base_name = base_name_of(transformer.repo if isinstance(transformer, HubPart) else transformer.path.name)
    return ModelSpec(
        id=name,
        description=said.description or f"{transformer}, of this server's settings",
        transformer=transformer,
        text_encoder=others["text_encoder"],
        tokenizer=others["tokenizer"],
        autoencoder=others["autoencoder"],
        base_name=base_name,
        defaults=_defaults(said, usual_defaults(base_name)),
    )


def _defaults(said: ModelSettings, usual: ModelDefaults) -> ModelDefaults:
    schedule = usual.schedule if said.schedule is None else said.schedule
    steps = usual.sample_steps if said.steps is None else said.steps
    least = LEAST_STEPS.get(schedule, 1)
    if steps < least:
        raise ValueError(f"steps: the schedule {schedule} needs {least} or more, got {steps}")
    shift = usual.shift if schedule == usual.schedule else None  # a shift goes with its schedule
    return ModelDefaults(
        width=usual.width if said.width is None else said.width,
        height=usual.height if said.height is None else said.height,
        sample_steps=steps,
        guidance_scale=usual.guidance_scale if said.guidance is None else said.guidance,
        sampler=usual.sampler if said.sampler is None else said.sampler,
        schedule=schedule,
        shift=shift if said.shift is None else said.shift,
        profile=said.profile or usual.profile,
    )


def _source(key: str, text: str, *, must_exist: bool) -> HubPart | LocalPart:
    """A file or folder that is there; else what the hub has by this name.

    Raises:
        ValueError: naming the key.
    """
    path = Path(text).expanduser()
    looks_like_path = path.is_absolute() or text.startswith((".", "~")) or text.endswith(FILE_SUFFIXES)
    if _is_there(path) or (looks_like_path and not must_exist and ":" not in text):
        return LocalPart(path.absolute())
    found = None if path.is_absolute() or text.startswith((".", "~")) else hub_part(text)
    if found is None or (not found.path and looks_like_path):
        raise ValueError(
            f"{key}: {text}: no such file or folder, and no owner/name or owner/name:file of the Hugging Face hub"
        )
    return found


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def parse_models(text: str) -> dict[str, dict[str, str]]:
    """`NAME=FILE_OR_REPO,key=value,…`, several after another: NAME to its keys.

    A value with a comma cannot be written so; the file's `[models.NAME]` takes it.

    Raises:
        ValueError: naming the piece at fault.
    """
    models: dict[str, dict[str, str]] = {}
    current: dict[str, str] | None = None
    for piece in text.split(","):
        name, equals, value = (part.strip() for part in piece.partition("="))
        if not equals or not name or not value:
            raise ValueError(
                f"{piece.strip()}: write NAME=FILE_OR_REPO,key=value,…; a value with a comma belongs into the "
                "file of --config, under [models.NAME]"
            )
        if name in KEYS:
            if current is None:
                raise ValueError(f"{piece.strip()}: begin with NAME=FILE_OR_REPO; {name} is a key of a model")
            if name in current:
                raise ValueError(f"{piece.strip()}: the key {name} is given twice")
            current[name] = value
        elif current is not None and not _may_be_weights(value):
            raise ValueError(f"{piece.strip()}: no such key: {name}; known are {', '.join(KEYS)}")
        elif name in models:
            raise ValueError(f"{piece.strip()}: the model {name} is given twice")
        else:
            models[name] = current = {"transformer": value}
    return models


def _may_be_weights(value: str) -> bool:
    """Whether a value can be where weights lie, and not that of a key that was mistyped."""
    return "/" in value or "\\" in value or value.endswith(FILE_SUFFIXES) or _is_there(Path(value))


def _parsed(value: object) -> object:
    """Of flags and the environment, which give text; flags that are repeated are joined by commas."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    if not isinstance(value, str):
        return value
    return parse_models(value) if value.strip() else {}


def _checked_names(models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
    for name in models:
        require_model_id(name)
    return models


def require_model_id(name: str) -> None:
    """Checks what a model is called.

    Raises:
        ValueError: a request could not name it.
    """
    if MODEL_ID.fullmatch(name) is None:
        raise ValueError(
            f"{name}: a model's name is made of lower-case letters, digits, '.', '_' and '-', 64 at most"
        )
    if name in KEYS:
        raise ValueError(f"{name}: a model cannot be called like one of its keys")


def require_known(
    known: Collection[str],
    *,
    aliases: Mapping[str, str],
    folders: Mapping[str, Path],
    preloaded: Sequence[str],
) -> None:
    """Checks that settings name models that there are.

    Raises:
        ValueError: naming the setting, and the models that there are.
    """
    named = [
        *((f"--alias {one}={other}", name) for one, other in aliases.items() for name in (one, other)),
        *((f"--model-folder {name}={folder}", name) for name, folder in folders.items()),
        *((f"--preload {name}", name) for name in preloaded),
    ]
    for where, name in named:
        if name not in known:
            raise ValueError(f"{where}: no such model: {name}; known are {', '.join(known)}")


def parse_size(text: str) -> tuple[int, int]:
    """`1024x1024` → width and height in pixels, multiples of 32.

    Raises:
        ValueError: it is no size.
    """
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"not a size: {text}; write it like 1024x1024")
    sides = int(width), int(height)
    if any(not 64 <= side <= 4096 or side % 32 for side in sides):
        raise ValueError(f"{text}: sides are multiples of 32 from 64 to 4096")
    return sides


def _size(text: str) -> str:
    parse_size(text)
    return text


ImageSize = Annotated[str, AfterValidator(_size)]
"""Of `--warm-up`."""
ModelFlags = Annotated[
    dict[str, ModelSettings], NoDecode, BeforeValidator(_parsed), AfterValidator(_checked_names)
]
"""Of `--model`."""
ModelTables = Annotated[dict[str, ModelSettings], AfterValidator(_checked_names)]
"""Of `[models.NAME]`."""


def configured_models(
    tables: Mapping[str, ModelSettings], flags: Mapping[str, ModelSettings], *, must_exist: bool = True
) -> dict[str, ModelSpec]:
    """The models of the settings by name; a flag wins over the file.

    Raises:
        ValueError: naming where it is said, and the key.
    """
    found: dict[str, ModelSpec] = {}
    for name, said in {**tables, **flags}.items():
        where = f"--model {name}" if name in flags else f"[models.{name}]"
        try:
            found[name] = model_spec(name, said, must_exist=must_exist)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return found
