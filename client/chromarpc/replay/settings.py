"""What a training config decides about its samples, resolved as ai-toolkit resolves it, with its defaults.

Facts of ai-toolkit 27a03a91: `SampleConfig`, `SampleItem`, `GenerateImageConfig` and `ModelConfig` in
toolkit/config_modules.py, `sample()` in jobs/process/BaseSDTrainProcess.py. Knows no file and no server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from chromarpc.replay.config_file import ConfigError, Plain, unresolved, with_name

ARCHITECTURE: Final = "chroma"
SIZE_DIVISOR: Final = 16
MIN_SIZE_PX: Final = 64
_SEED_BITS: Final = 2**32
"""As much of a seed as the generator on a CPU looks at."""
_UNHONOURED: Final = {
    "lora_path": "an adapter merged into the base",
    "inference_lora_path": "an adapter that only samples use",
    "assistant_lora_path": "an assistant adapter",
    "unconditional_lora_path": "an adapter of the unconditional pass",
}


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What decides how the trainer computes; by the config's names."""

    quantize: bool
    qtype: str
    quantize_te: bool
    dtype: str
    """As written; `fp32` where nobody says."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """One sample, with nothing left open."""

    prompt: str
    negative_prompt: str
    requested_width: int
    requested_height: int
    seed: int | None
    """As written; None where the trainer drew one and told nobody."""
    steps: int
    guidance_scale: float
    network_multiplier: float

    @property
    def width(self) -> int:
        """Pixels of the picture."""
        return effective_size(self.requested_width)

    @property
    def height(self) -> int:
        """Pixels of the picture."""
        return effective_size(self.requested_height)

    @property
    def request_seed(self) -> int | None:
        """The seed that draws the same noise and that a request can hold."""
        if self.seed is None or 0 <= self.seed < 2**63:
            return self.seed
        return self.seed % _SEED_BITS


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run's config, resolved."""

    name: str
    """The job's, which its files are called by."""
    trainer: TrainerSettings
    base_model: str
    """`model.name_or_path`; empty where there is none."""
    network_type: str
    """`lora`, `lokr`, …; empty where the run trains no adapter."""
    pretrained: bool
    """Whether the run went on from another adapter, so that step 0 is not the bare model."""
    samples: tuple[SampleSettings | str, ...]
    """By index; a text says why the trainer could not have drawn it."""
    first_samples: tuple[SampleSettings | str, ...] = ()
    """Those of step 0 that have settings of their own, by index."""
    first_replaces: bool = False
    """Whether step 0 has only those."""
    sample_every: int | None = None
    save_every: int | None = None
    saves_kept: int | None = None
    total_steps: int | None = None
    assumptions: tuple[str, ...] = ()
    """What the config leaves open or what cannot be honoured, each a sentence."""
    unresolved: tuple[str, ...] = field(default=())
    """Names of `${NAME}` that were not allowed."""

    def sample(self, step: int, index: int) -> SampleSettings | str | None:
        """The sample of an index at a step; a text says why not; None where the config has no such sample."""
        if step == 0 and (self.first_replaces or index >= len(self.samples)):
            return self.first_samples[index] if index < len(self.first_samples) else None
        return self.samples[index] if index < len(self.samples) else None


def effective_size(asked: int) -> int:
    """Pixels of a picture for what was asked: at least 64, floored to 8, then to 16."""
    return max(MIN_SIZE_PX, asked - asked % 8) // SIZE_DIVISOR * SIZE_DIVISOR


def resolve_run(config: Mapping[str, Plain]) -> TrainingRun:
    """The run of a config.

    Raises:
        ConfigError: it is none of ai-toolkit, or not of a Chroma model.
    """
    job = config.get("config")
    if not isinstance(job, dict) or "process" not in job:
        raise ConfigError("this is no training config of ai-toolkit: it has no config.process")
    name = job.get("name")
    if not isinstance(name, str | int) or not f"{name}":
        raise ConfigError("this is no training config of ai-toolkit: it has no config.name")
    named = with_name(job, f"{name}")
    process = _process(named if isinstance(named, dict) else {})
    model = _mapping(process, "model")
    _check_architecture(model)
    assumptions: list[str] = []
    train, save, network = (_mapping(process, key) for key in ("train", "save", "network"))
    samples, sample_config = _samples(process, "sample", assumptions)
    first, _ = _samples(process, "first_sample", assumptions) if process.get("first_sample") else ((), {})
    assumptions += _unhonoured(process, model)
    run = TrainingRun(
        name=f"{name}",
        trainer=_trainer(model, train, assumptions),
        base_model=_text(model.get("name_or_path")),
        network_type=_text(network.get("type", "lora")).lower() if process.get("network") else "",
        pretrained=bool(network.get("pretrained_lora_path")),
        samples=samples,
        first_samples=first,
        first_replaces=bool(first) and bool(train.get("skip_first_sample")),
        sample_every=_whole(sample_config.get("sample_every", 100)),
        save_every=_whole(save.get("save_every", 1000)),
        saves_kept=_whole(save.get("max_step_saves_to_keep", 5)),
        total_steps=_whole(train.get("steps", 1000)),
        assumptions=tuple(dict.fromkeys(assumptions)),
    )
    return replace(run, unresolved=_unresolved(process))


def _process(job: Mapping[str, Plain]) -> dict[str, Plain]:
    processes = job.get("process")
    found = [item for item in processes if isinstance(item, dict)] if isinstance(processes, list) else []
    trained = [item for item in found if isinstance(item.get("model"), dict)]
    if not trained:
        raise ConfigError("this is no training config of ai-toolkit: none of its processes names a model")
    return trained[0]


def _check_architecture(model: Mapping[str, Plain]) -> None:
    architecture = _text(model.get("arch")).split(":")[0]
    if architecture == ARCHITECTURE:
        return
    if not architecture:
        flags = [key for key, value in model.items() if key.startswith("is_") and value is True]
        architecture = flags[0].removeprefix("is_") if flags else ""
    said = f"the run trains {architecture!r}" if architecture else "the config names no architecture (model.arch)"
    raise ConfigError(f"{said}; only {ARCHITECTURE!r} can be redrawn")


def _trainer(model: Mapping[str, Plain], train: Mapping[str, Plain], assumptions: list[str]) -> TrainerSettings:
    quantize = bool(model.get("quantize", False))
    qtype = _text(model.get("qtype", "qfloat8"))
    if model.get("layer_offloading", model.get("auto_memory", False)) and qtype == "qfloat8":
        qtype = "float8"
        assumptions.append(
            "layer_offloading: the trainer then quantizes by torchao; taken for torchao 0.10, which it had until "
            "2026-07-27"
        )
    if "|" in qtype:
        qtype = qtype.split("|", maxsplit=1)[0]
        assumptions.append("the accuracy recovery adapter in model.qtype has no effect on Chroma")
    if "dtype" not in train:
        assumptions.append("train.dtype is not set: the trainer computes in float32 then")
    return TrainerSettings(
        quantize=quantize,
        qtype=qtype,
        quantize_te=bool(model.get("quantize_te", quantize)),
        dtype=_text(train.get("dtype", "fp32")),
    )


def _unhonoured(process: Mapping[str, Plain], model: Mapping[str, Plain]) -> list[str]:
    said = [f"model.{key} cannot be honoured: {what}" for key, what in _UNHONOURED.items() if model.get(key)]
    if model.get("quantize_kwargs"):
        said.append("model.quantize_kwargs cannot be honoured: the trainer left some layers as they are")
    others = [key for key in ("embedding", "adapter", "decorator") if process.get(key)]
    said += [f"process.{key} cannot be honoured: it changes the samples too" for key in others]
    if _mapping(process, "train").get("train_text_encoder"):
        said.append("train.train_text_encoder: what the adapter changes in the text encoder cannot be honoured")
    return said


def _samples(
    process: Mapping[str, Plain], key: str, assumptions: list[str]
) -> tuple[tuple[SampleSettings | str, ...], Mapping[str, Plain]]:
    config = _mapping(process, key)
    listed = config.get("samples")
    if not isinstance(listed, list):
        prompts = config.get("prompts")
        listed = [{"prompt": prompt} for prompt in prompts] if isinstance(prompts, list) else []
    items = [item if isinstance(item, dict) else {"prompt": item} for item in listed]
    if "neg" not in config and any("neg" not in item for item in items):
        assumptions.append(f"{key}.neg is not set, which ends today's trainer with an error: taken as empty")
    # The trainer counts prompts without those that are null, and items with them.
    prompts = [item["prompt"] for item in items if item.get("prompt") is not None]
    trigger_word = process.get("trigger_word")
    start_seed = _integer(config.get("seed", 0), "seed")
    current: int | str = start_seed
    resolved: list[SampleSettings | str] = []
    for index, prompt in enumerate(prompts):
        item = items[index]
        if config.get("walk_seed") and isinstance(start_seed, int):
            current = start_seed + index
        if item.get("seed") is not None:
            current = _integer(item["seed"], "seed")
        resolved.append(_sample(prompt, item, config, current, trigger_word))
    return tuple(resolved), config


def _sample(
    prompt: Plain, item: Mapping[str, Plain], config: Mapping[str, Plain], seed: int | str, trigger_word: Plain
) -> SampleSettings | str:
    defaults: dict[str, Plain] = {
        "width": 512, "height": 512, "neg": "", "guidance_scale": 7, "sample_steps": 20, "network_multiplier": 1,
    }  # fmt: skip
    said = {key: item.get(key, config.get(key, default)) for key, default in defaults.items()}
    text = _text(prompt)
    if trigger_word is not None:
        text = text.replace("[name]", _text(trigger_word)).replace("[trigger]", _text(trigger_word))
    values: dict[str, object] = {
        "negative_prompt": _text(said["neg"]) if said["neg"] is not False else "",
        "requested_width": _integer(said["width"], "width"),
        "requested_height": _integer(said["height"], "height"),
        "seed": None if seed == -1 else seed,
        "steps": _integer(said["sample_steps"], "sample_steps"),
        "guidance_scale": _number(said["guidance_scale"], "guidance_scale"),
        "network_multiplier": _multiplier(said["network_multiplier"]),
    }
    text, flags = split_flags(text)
    values |= flags
    for value in (values[name] for name in values if name != "negative_prompt"):
        if isinstance(value, str):
            return value
    return SampleSettings(prompt=text, **values)  # type: ignore[arg-type]


_FLAGS: Final = {
    "n": "negative_prompt",
    "w": "requested_width",
    "h": "requested_height",
    "d": "seed",
    "seed": "seed",
    "s": "steps",
    "steps": "steps",
    "l": "guidance_scale",
    "cfg": "guidance_scale",
    "m": "network_multiplier",
    "network_multiplier": "network_multiplier",
}
_WHOLE: Final = frozenset({"requested_width", "requested_height", "seed", "steps"})


def split_flags(prompt: str) -> tuple[str, dict[str, object]]:
    """A prompt's text and what its flags (`--w 320`) override, by the names of `SampleSettings`.

    A value that is no number comes as a text that says so. Flags that have no effect on Chroma are left out, as
    are those that the trainer does not know; their text is gone all the same.
    """
    if not prompt:
        return prompt, {}
    text, *parts = prompt.strip().split("--")
    found: dict[str, object] = {}
    for part in parts:
        flag = part.split(" ")[0].strip()
        content = part[len(flag) :].strip()
        name = _FLAGS.get(flag)
        if name is None:
            continue
        if name == "negative_prompt":
            found[name] = content
        elif name in _WHOLE:
            found[name] = _integer(content, f"--{flag}")
        else:
            found[name] = _number(content, f"--{flag}")
    return text.strip(), found


def _multiplier(value: Plain) -> float | str:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return 1.0
    return _number(value, "network_multiplier")


def _integer(value: Plain, name: str) -> int | str:
    """A whole number, or why it is none."""
    number: float | None = None
    try:
        if isinstance(value, str) and len(value) <= 64:
            return int(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = value
    except ValueError:
        pass
    if number is None or not math.isfinite(number) or number != int(number):
        return f"{name} is no whole number: {_shown(value)}"
    return int(number)


def _number(value: Plain, name: str) -> float | str:
    """A number, or why it is none; a whole one stays whole."""
    try:
        if isinstance(value, str) and len(value) <= 64:
            return float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    except ValueError:
        pass
    return f"{name} is no number: {_shown(value)}"


def _shown(value: Plain) -> str:
    return repr(value)[:60]


def _whole(value: Plain) -> int | None:
    number = _integer(value, "")
    return number if isinstance(number, int) else None


def _mapping(parent: Mapping[str, Plain], key: str) -> Mapping[str, Plain]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: Plain) -> str:
    return "" if value is None else f"{value}"


def _unresolved(value: Plain) -> tuple[str, ...]:
    if isinstance(value, str):
        return unresolved(value)
    children = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
    return tuple(dict.fromkeys(name for child in children for name in _unresolved(child)))
