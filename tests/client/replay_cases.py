"""What the Python client and the page have to agree on about a run folder: inputs, and what Python makes of them.

`python -m tests.client.replay_cases` writes `replay_cases.json`; the page's own tests read it.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import yaml
from PIL import Image

from chromarpc.events import NoiseDraw
from chromarpc.replay import facts, similarity
from chromarpc.replay.calibration import Trial, judge
from chromarpc.replay.config_file import ConfigError, read_config
from chromarpc.replay.pairing import FACTORIZED_LOKR_SINCE, FLOAT32_DRAW_SINCE, pair
from chromarpc.replay.run_folder import RunFolder
from chromarpc.replay.settings import SampleSettings, TrainingRun, effective_size, resolve_run
from tests.client.replay_configs import CHANGES, JSON_TEXTS, TEXTS
from tests.client.replay_fake_server import OLD_TIME_MS, TIME_MS, Run, safetensors

FILE: Final = Path(__file__).parent / "replay_cases.json"
_RUNS: Final = Path(__file__).parent.parent / "goldens" / "preview_runs"
_LIBRARYS_WORDS: Final = ("no YAML that can be read: ", ".json: ")
"""What follows is the parser's own text."""


def cases() -> dict[str, Any]:
    """All cases, as JSON values."""
    return {
        "configs": [_config(name, file, content) for name, file, content in _configs()],
        "sizes": [[asked, effective_size(asked)] for asked in (1, 63, 64, 79, 80, 200, 215, 216, 1023, 4096)],
        "folders": [_folder(name, run, files) for name, run, files in _folders()],
        "calibrations": [_calibration(*case) for case in _calibrations()],
        "similarities": [_similarity(*case) for case in _similarities()],
        "summaries": [_summary(summary) for summary in _summaries()],
        "reasons": [[reason, facts._short(reason)] for reason in _REASONS],
    }


def _config(name: str, file: str, content: bytes) -> dict[str, Any]:
    case: dict[str, Any] = {"name": name, "file": file} | _content(content)
    try:
        values = read_config(content, file, environment={})
        case["values"] = repr(values)
        case["run"] = _run(resolve_run(values))
    except ConfigError as error:
        case["error"] = f"{error}"
        for words in _LIBRARYS_WORDS:
            before, found, _ = case["error"].partition(words)
            if found:
                case["error"] = before + words
    return case


def _content(content: bytes) -> dict[str, str]:
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _run(run: TrainingRun) -> dict[str, Any]:
    return asdict(run) | {
        "samples": [_sample(sample) for sample in run.samples],
        "first_samples": [_sample(sample) for sample in run.first_samples],
    }


def _sample(sample: SampleSettings | str) -> dict[str, Any] | str:
    if isinstance(sample, str):
        return sample
    return asdict(sample) | {
        "width": sample.width,
        "height": sample.height,
        "seed": None if sample.seed is None else str(sample.seed),
        "request_seed": None if sample.request_seed is None else str(sample.request_seed),
    }


def _configs() -> Iterator[tuple[str, str, bytes]]:
    for folder in ("exact", "rounded"):
        yield f"recorded {folder}", "config.yaml", (_RUNS / folder / "config.yaml").read_bytes()
    yield "recorded by the interface", ".job_config.json", (_RUNS / "rounded" / "job_config.json").read_bytes()
    for name, change in CHANGES.items():
        config = Run(Path(), **change).config
        yield name, "config.yaml", yaml.safe_dump(config, sort_keys=False).encode()
        yield f"{name}, as JSON", ".job_config.json", json.dumps(config).encode()
    for name, text in TEXTS.items():
        yield name, "config.yaml", text.encode()
    yield "a byte order mark", "config.yaml", b"\xef\xbb\xbfa: 1"
    yield "no text", "config.yaml", b"\xff\xfe\x00"
    for name, text in JSON_TEXTS.items():
        yield name, ".job_config.json", text.encode()


def _folder(name: str, run: Run, files: dict[str, bytes]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        run.path = Path(place)
        run.write_config()
        for path, content in files.items():
            (run.path / path).parent.mkdir(parents=True, exist_ok=True)
            (run.path / path).write_bytes(content)
        written = {
            f"{path.relative_to(run.path)}": _content(path.read_bytes())
            for path in sorted(run.path.rglob("*"))
            if path.is_file()
        }
        with RunFolder(run.path) as folder:
            config, content = folder.config()
            found = pair(resolve_run(read_config(content, config, environment={})), folder)
    return {
        "name": name,
        "files": written,
        "rows": [
            {
                "file": row.file.name,
                "time_ms": row.file.time_ms,
                "step": row.file.step,
                "index": row.file.index,
                "checkpoint": row.checkpoint,
                "checkpoint_kept": row.checkpoint_kept,
                # How a variable may be replaced is another matter on a page.
                "reason": row.reason.partition(", which is replaced only")[0] if row.reason else None,
                "is_old": row.drawn_at is not None and row.drawn_at < FLOAT32_DRAW_SINCE,
                "is_factorized": row.drawn_at is not None and row.drawn_at >= FACTORIZED_LOKR_SINCE,
            }
            for row in found.rows
        ],
        "ignored": [[ignored.name, ignored.reason] for ignored in found.ignored],
    }


def _samples(*steps: int, time_ms: int = TIME_MS) -> dict[str, bytes]:
    return {f"samples/{time_ms + step}__{step:09d}_0.jpg": b"" for step in steps}


def _folders() -> Iterator[tuple[str, Run, dict[str, bytes]]]:
    def run(**change: Any) -> Run:
        return Run(Path(), **change)

    yield "pairs by step", run(), {
        **_samples(0, 250, 500), "my_run.safetensors": safetensors(500),
        "my_run_000000250.safetensors": safetensors(250),
    }  # fmt: skip
    yield "a last adapter without a step", run(), {**_samples(250, 400), "my_run.safetensors": safetensors()}
    yield "a last adapter of an earlier end", run(), {**_samples(250, 500), "my_run.safetensors": safetensors(250)}
    yield "a name that ends like a step", run(name="frm_000000250"), {
        **_samples(250, 500), "frm_000000250.safetensors": safetensors(500),
        "frm_000000250_000000250.safetensors": safetensors(250),
    }  # fmt: skip
    yield "an adapter that says another step", run(), {
        **_samples(250), "my_run_000000250.safetensors": safetensors(125),
    }  # fmt: skip
    yield "a step that saves nothing", run(), _samples(100, 750)
    yield "deleted checkpoints", run(), {**_samples(250, 500), "my_run_000000750.safetensors": safetensors(750)}
    yield "a name with LoRA", run(), {**_samples(250), "my_run_LoRA_000000250.safetensors": safetensors(250)}
    yield "an adapter of another model", run(), {
        **_samples(250), "my_run_000000250.safetensors": safetensors(250, base_model="flux1"),
    }  # fmt: skip
    for name, content in (
        ("an empty adapter", b""), ("an adapter that lies about its header", b"\xff" * 8 + b"{}"),
        ("an adapter whose header is a list", b"\x02" + b"\0" * 7 + b"[]"),
    ):  # fmt: skip
        yield name, run(), {**_samples(250), "my_run_000000250.safetensors": content}
    yield "another adapter before", run(network={"type": "lora", "pretrained_lora_path": "/x"}), _samples(0)
    yield "no adapter at all", run(network=None), _samples(250)
    yield "a drawn seed", run(sample={"seed": -1}), _samples(0)
    yield "no such sample", run(sample={"prompts": []}), _samples(0)
    yield "a variable", run(sample={"prompts": ["by ${WHO}"]}), _samples(0)
    yield "what the trainer could not draw", run(sample={"width": "wide"}), _samples(0)
    yield "a path for a name", run(name="../outside"), _samples(250)
    yield "foreign files", run(), {
        **_samples(0),
        f"samples/{TIME_MS}__000000000_1.png": b"", f"samples/{TIME_MS}__000000000_1.webp": b"",
        f"samples/.thumbs/{TIME_MS}__000000000_0.jpg.jpg": b"",
        "samples/.hidden": b"", "samples/folder/x.jpg": b"",
        f"samples/{TIME_MS}__000000250_0.jpg.jpg": b"", f"samples/{TIME_MS}__250_0.jpg": b"",
        "samples/holiday.jpg": b"", f"samples/{TIME_MS}__000000250_0.mp4": b"", "optimizer.pt": b"",
    }  # fmt: skip
    yield (
        "drawn again",
        run(),
        {f"samples/{time_ms}__000000000_0.jpg": b"" for time_ms in (TIME_MS + 5, TIME_MS, TIME_MS + 2)},
    )
    yield "older and newer times", run(), {
        **_samples(0, time_ms=OLD_TIME_MS), **_samples(250, time_ms=999_999_999_999_999_999),
        **_samples(500, time_ms=1_785_110_399_499), **_samples(750, time_ms=1_785_110_399_250),
    }  # fmt: skip


def _calibration(trials: Sequence[dict[NoiseDraw, float]], likely: NoiseDraw, step: int) -> dict[str, Any]:
    tried = [Trial(step=step, index=index, psnr_db=psnr_db) for index, psnr_db in enumerate(trials)]
    found = judge(tried, likely=likely, with_adapter=step > 0)
    return {
        "trials": [{"step": t.step, "index": t.index, "psnr_db": t.psnr_db, "decides": t.decides} for t in tried],
        "likely": likely,
        "with_adapter": step > 0,
        "noise_draw": found.noise_draw,
        "matches": found.matches,
        "sentence": found.sentence,
    }


def _calibrations() -> Iterator[tuple[list[dict[NoiseDraw, float]], NoiseDraw, int]]:
    yield [{"float32": 48.2, "legacy": 17.3}], "legacy", 0
    yield [{"float32": 12.0, "legacy": 31.0}], "float32", 0
    yield [{"float32": 14.0, "legacy": 12.5}, {"float32": 16.1, "legacy": 15.0}], "float32", 0
    yield [{"float32": 14.0, "legacy": 12.5}], "legacy", 250
    yield [{"float32": 28.5, "legacy": 20.5}], "legacy", 0
    yield [{"float32": 28.4, "legacy": 20.5}], "legacy", 0
    yield [{"float32": 40.0, "legacy": 38.0}, {"float32": 41.0, "legacy": 35.0}], "legacy", 0
    yield [{"float32": 40.0, "legacy": 40.0}, {"float32": 12.0, "legacy": 11.0}], "legacy", 0
    yield [{"legacy": 40.0}], "float32", 0
    yield [{}], "float32", 0
    yield [{}, {"float32": 100.0, "legacy": 20.0}], "legacy", 500
    yield [{"float32": 29.96, "legacy": 29.94}], "legacy", 0


def drawn(width: int, height: int, factors: Sequence[int]) -> Image.Image:
    """A picture by a formula that is easily repeated: red, green and blue of a pixel of one."""
    red, green, blue, bend = factors
    pixels = bytes(
        value % 256
        for y in range(height)
        for x in range(width)
        for value in (red * x + y, green * y + x * x // bend, blue * (x + y) // bend)
    )
    return Image.frombytes("RGB", (width, height), pixels)


def _similarity(width: int, height: int, first: Sequence[int], second: Sequence[int]) -> dict[str, Any]:
    files = []
    for factors in (first, second):
        file = io.BytesIO()
        drawn(width, height, factors).save(file, "PNG")
        files.append(file.getvalue())
    found = similarity.compare(*files)
    return {
        "size": [width, height],
        "factors": [first, second],
        "psnr_db": round(found.psnr_db, 9),
        "ssim": round(found.ssim, 4),  # Python's is computed in single precision
        "same_pixels": found.same_pixels,
        "largest_difference": found.largest_difference,
    }


def _similarities() -> Iterator[tuple[int, int, list[int], list[int]]]:
    yield 64, 64, [3, 5, 7, 16], [3, 5, 7, 16]
    yield 64, 80, [3, 5, 7, 16], [3, 5, 7, 17]
    yield 64, 64, [0, 0, 0, 9999], [0, 0, 1, 9999]
    yield 52, 61, [1, 2, 3, 50], [1, 2, 3, 51]
    yield 5, 6, [9, 20, 31, 4], [9, 21, 31, 4]


def _summary(summary: dict[str, Any]) -> dict[str, Any]:
    return summary | {"line": facts.count_line(summary), "verdict": facts.verdict_line(summary)}


def _summaries() -> Iterator[dict[str, Any]]:
    for drawn_count, identical, below, median, lowest, reasons in (
        (6, 6, 0, 100.0, 100.0, {}),
        (1, 1, 0, 100.0, 100.0, {}),
        (6, 2, 0, 48.21, 44.1, {}),
        (6, 0, 0, 100.0, 100.0, {}),
        (5, 0, 0, 36.0, 33.3, {"checkpoint deleted": 1}),
        (3, 0, 2, 28.0, 12.0, {"checkpoint deleted": 2, "the trainer's file is no picture, or a broken one": 1}),
        (0, 0, 0, None, None, {"base or settings differ": 1}),
    ):
        missing = sum(reasons.values())
        yield {
            "samples": drawn_count + missing, "drawn": drawn_count, "not_drawn": missing, "reasons": reasons,
            "identical": identical, "below_min_psnr": below, "min_psnr_db": 30.0, "median_psnr_db": median,
            "lowest_psnr_db": lowest, "not_asked_for": 0,
        }  # fmt: skip


_REASONS: Final = (
    None, "", "checkpoint deleted (max_step_saves_to_keep: 4)",
    "checkpoint deleted: the run's last adapter is gone", "the LoRA fits no layer; more", "x" * 81, "x" * 80,
)  # fmt: skip


def text() -> str:
    """The file's content."""
    return json.dumps(cases(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
