"""Facts of a picture that a trainer drew while it trained, out of the run's folder: the picture tells none."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from chromarpc.pictures.facts import UNKNOWN, Fact, PictureFacts, name_of_file
from chromarpc.pictures.recorded import DTYPES, GUIDANCE, SAMPLER, SCHEDULER
from chromarpc.pictures.requests import request_of
from chromarpc.replay.config_file import ConfigError, read_config
from chromarpc.replay.pairing import FACTORIZED_LOKR_SINCE, FLOAT32_DRAW_SINCE, Row, pair
from chromarpc.replay.run_folder import SAMPLES, RunFolder, Unreadable
from chromarpc.replay.settings import SampleSettings, TrainingRun, resolve_run
from chromarpc.request import DEFAULT_MODEL

PROFILE: Final = "preview"
PROGRAM: Final = "ai-toolkit"
MODELS: Final = (DEFAULT_MODEL, "chroma-mini")
"""Ids that a base model's file may be called by."""


class NoSample(Exception):
    """The folder says nothing of this picture; a sentence for people."""


def sample_facts(run_folder: Path, picture: Path) -> PictureFacts:
    """What a run's config says of one of its samples, which is known by its file's name.

    Raises:
        NoSample: it is no sample of this run, or its config cannot be read.
    """
    try:
        with RunFolder(run_folder) as folder:
            name, content = folder.config()
            run = resolve_run(read_config(content, name, environment={}))
            rows = pair(run, folder).rows
            wanted = f"{SAMPLES}/{picture.name}"
            row = next((row for row in rows if row.file.name == wanted), None)
            if row is None:
                raise NoSample(f"{picture.name} is no sample of this run")
            sha256 = folder.sha256(row.checkpoint) if row.checkpoint is not None and row.checkpoint_kept else None
    except (ConfigError, Unreadable) as error:
        raise NoSample(f"{error}") from None
    except OSError as error:
        raise NoSample(f"{run_folder}: {error.strerror or error}") from None
    if row.settings is None:
        raise NoSample(f"{picture.name}: {row.reason}")
    return _facts(run, row, row.settings, sha256)


def _facts(run: TrainingRun, row: Row, settings: SampleSettings, sha256: str | None) -> PictureFacts:
    drawn_at = row.drawn_at
    draw = "legacy" if drawn_at is not None and drawn_at < FLOAT32_DRAW_SINCE else "float32"
    by_date = "by the sample's date"
    trainer = run.trainer
    facts = {
        "model": Fact(run.base_model, "as its config names it", same_as=name_of_file(run.base_model))
        if run.base_model
        else UNKNOWN,
        "profile": Fact("preview-exact", "the trainer's own picture"),
        "dtype": Fact(trainer.dtype, same_as=DTYPES.get(trainer.dtype)),
        "prompt": Fact(settings.prompt),
        "neg": Fact(settings.negative_prompt),
        "width": _side(settings.width, settings.requested_width),
        "height": _side(settings.height, settings.requested_height),
        "seed": UNKNOWN if settings.seed is None else Fact(settings.seed),
        "noise_draw": Fact(draw, by_date),
        "sample_steps": Fact(settings.steps),
        "sampler": SAMPLER,
        "scheduler": SCHEDULER,
        "guidance_scale": Fact(float(settings.guidance_scale)),
        "guidance": GUIDANCE,
        "trainer.quantize": Fact(trainer.quantize),
        "trainer.qtype": Fact(trainer.qtype),
        "trainer.quantize_te": Fact(trainer.quantize_te),
        "trainer.dtype": Fact(trainer.dtype, same_as=DTYPES.get(trainer.dtype)),
        "output.format": Fact("jpeg-trainer" if row.file.name.endswith((".jpg", ".jpeg")) else "as its file"),
    }
    said: dict[str, object] = {
        "quantize": trainer.quantize,
        "qtype": trainer.qtype,
        "quantize_te": trainer.quantize_te,
        "dtype": trainer.dtype,
    }
    if run.network_type == "lokr":
        new = drawn_at is not None and drawn_at >= FACTORIZED_LOKR_SINCE
        facts["trainer.lokr_form"] = Fact("factorized" if new else "weight", by_date)
        said["lokr_form"] = f"LOKR_FORM_{'FACTORIZED' if new else 'WEIGHT'}"
    if row.checkpoint is not None:
        kept = "" if row.checkpoint_kept else row.reason or "no longer in the folder"
        facts["loras.0.path"] = Fact(row.checkpoint, kept, same_as=name_of_file(row.checkpoint))
        facts["loras.0.sha256"] = Fact(sha256, "as saved: rounded, the trainer drew with float32")
        facts["loras.0.network_multiplier"] = Fact(float(settings.network_multiplier))
        is_beside = trainer.quantize
        note = "computed beside the weights" if is_beside else "merged into the weights, which are not quantized"
        facts["loras.0.placement"] = Fact("beside" if is_beside else "merged", note)
    base = name_of_file(run.base_model)
    model = base if base in MODELS else DEFAULT_MODEL
    more = {
        "model": model,
        "profile": PROFILE,
        "noise_draw": f"NOISE_DRAW_{draw.upper()}",
        "trainer": said,
        "output": {"format": "IMAGE_FORMAT_JPEG_TRAINER"},
    }
    request = request_of(facts | {"seed": Fact(settings.request_seed)}, **more)
    remarks = [] if row.reason is None else [row.reason]
    if model != base:
        remarks.append(f"the config's base model is taken for {model}")
    return PictureFacts(program=PROGRAM, facts=facts, request=request, remarks=(*remarks, *run.assumptions))


def _side(drawn: int, asked: int) -> Fact:
    return Fact(drawn, "" if drawn == asked else f"{asked} in the config, floored")
