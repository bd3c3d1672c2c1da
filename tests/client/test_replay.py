"""`chromarpc replay` against a server that draws: what is asked for, what the report says, how it ends."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
from PIL import Image, ImageFilter

from chromarpc.v1 import options_pb2
from tests.client.client_fake_server import Request
from tests.client.replay_command import Replay
from tests.client.replay_fake_server import FLOAT32, LEGACY, OLD_TIME_MS, Run, picture, trainer_jpeg


def blurred(drawn: Image.Image, request: Request) -> Image.Image:
    """Like the trainer's where there is an adapter, and not the same."""
    return drawn.filter(ImageFilter.GaussianBlur(0.4)) if request.loras else drawn


def test_a_run_is_drawn_again_identically(replay: Replay, run: Run) -> None:
    run.write_all()
    result = replay()
    assert result.stdout == f"{replay.out / 'index.html'}\n"
    summary = replay.facts["summary"]
    assert summary["line"] == "6 of 6 samples drawn again."
    assert summary["verdict"] == "Every picture is the trainer's own, byte for byte."
    assert (summary["samples"], summary["drawn"], summary["identical"]) == (6, 6, 6)
    for sample in replay.facts["samples"]:
        assert (sample["identical"], sample["psnr_db"], sample["reason"]) == (True, 100.0, None)
        assert sample["picture_sha256"] == sample["trainer_sha256"]


def test_what_is_asked_for_is_what_the_trainer_drew(replay: Replay, run: Run) -> None:
    run.sample = {"prompts": ["a [trigger] cat --m 0.8 --w 200 --seed 7 --n bad"], "walk_seed": False}
    run.process, run.model = {"trigger_word": "sks"}, {"qtype": "qint8", "quantize_te": False}
    run.write_config()
    sha256 = run.write_adapter("my_run.safetensors", 500)
    drawn = picture(prompt="a sks cat", neg="bad", width=200, seed=7, adapter=sha256, multiplier=0.8)
    run.write_sample(500, 0, trainer_jpeg(drawn))
    replay("--noise-draw", "float32")
    (request,) = replay.server.requests
    (prompt,) = request.prompts
    assert (prompt.prompt, prompt.neg, prompt.width, prompt.height) == ("a sks cat", "bad", 200, 64)
    assert (prompt.seed, prompt.sample_steps, prompt.guidance_scale) == (7, 2, 4)
    (lora,) = request.loras
    assert (lora.path, lora.network_multiplier, lora.expected_sha256) == (f"sha256:{sha256}", 0.8, sha256)
    trainer = request.trainer
    assert (trainer.quantize, trainer.qtype, trainer.quantize_te, trainer.dtype) == (True, "qint8", False, "bf16")
    assert not trainer.HasField("lokr_form")
    assert (request.profile, request.model, request.noise_draw) == ("preview", "chroma-mini", FLOAT32)
    assert request.output.format == options_pb2.IMAGE_FORMAT_JPEG_TRAINER
    assert replay.sample(500, 0)["identical"]


def test_adapters_that_the_server_lacks_are_uploaded_once(replay: Replay, run: Run) -> None:
    hashes = run.write_all(steps=(0, 250, 500))
    replay.server.root = {"jobs/known.safetensors": hashes[250]}
    replay()
    assert replay.server.upload_calls == ["my_run.safetensors"]
    paths = {request.loras[0].path for request in replay.server.requests if request.loras}
    assert paths == {"jobs/known.safetensors", f"sha256:{hashes[500]}"}
    assert replay.facts["summary"]["identical"] == 6


def test_a_deleted_checkpoint_is_counted_in_the_first_line(replay: Replay, run: Run) -> None:
    run.write_all()
    (run.path / "my_run_000000250.safetensors").unlink()
    replay()
    assert replay.facts["summary"]["line"] == "4 of 6 samples drawn again; 2 not: checkpoint deleted."
    assert replay.sample(250, 1)["reason"] == "checkpoint deleted (max_step_saves_to_keep: 4)"
    page = (replay.out / "index.html").read_text("utf-8")
    assert page.index("4 of 6 samples drawn again; 2 not: checkpoint deleted.") < page.index("<h1>")


def test_below_the_limit_ends_with_7_and_nothing_drawn_with_8(replay: Replay, run: Run) -> None:
    run.write_all()
    replay.server.retouch = blurred
    replay("--min-psnr", "90", exit_code=7)
    assert replay.facts["summary"]["below_min_psnr"] == 4
    replay("--min-psnr", "20")
    replay.folder = run.path.parent / "other"
    other = Run(replay.folder)
    other.write_config()
    other.write_sample(250, 0, trainer_jpeg(picture(prompt="a")))
    replay(exit_code=8)
    assert replay.facts["summary"]["line"] == "0 of 1 sample drawn again; 1 not: checkpoint deleted."


def test_only_what_is_asked_for_is_drawn_and_compared(replay: Replay, run: Run) -> None:
    run.write_all()
    replay("--steps", "500", "--samples", "1")
    assert [(one["step"], one["index"]) for one in replay.facts["samples"]] == [(500, 1)]
    assert replay.facts["summary"]["line"] == "1 of 1 sample drawn again; 5 not asked for."
    assert sum(1 for request in replay.server.requests if request.loras) == 1


class TestCalibration:
    def test_both_draws_are_tried_and_the_matching_one_is_kept(self, replay: Replay, run: Run) -> None:
        run.write_all(noise_draw=LEGACY)
        replay()
        draws = [request.noise_draw for request in replay.server.requests]
        assert sorted(draws[:2]) == [FLOAT32, LEGACY]
        assert set(draws[2:]) == {LEGACY}
        calibration = replay.facts["calibration"]
        assert (calibration["noise_draw"], calibration["matches"]) == ("legacy", True)
        assert replay.facts["summary"]["identical"] == 6
        assert len(replay.server.requests) == 7  # the one that was tried is not drawn again

    def test_where_neither_matches_it_says_so_before_the_rest_is_drawn(self, replay: Replay, run: Run) -> None:
        run.write_all(steps=(0, *range(250, 5000, 250)))
        replay.server.retouch = lambda drawn, request: drawn.rotate(180)
        result = replay(exit_code=7)
        said = "the base model or the settings differ, not the LoRA"
        assert said in result.stderr
        assert not any(request.loras for request in replay.server.requests)
        assert replay.facts["summary"]["reasons"] == {"base or settings differ": 38}
        assert said in (replay.out / "index.html").read_text("utf-8")

    def test_anyway_draws_all_the_same(self, replay: Replay, run: Run) -> None:
        run.write_all()
        replay.server.retouch = lambda drawn, request: drawn.rotate(180)
        replay("--anyway", exit_code=7)
        assert replay.facts["summary"]["drawn"] == 6

    def test_without_step_0_the_first_adapter_is_tried(self, replay: Replay, run: Run) -> None:
        run.write_all(steps=(250, 500), noise_draw=LEGACY)
        replay()
        assert replay.facts["calibration"]["trials"][0]["step"] == 250
        assert replay.facts["summary"]["identical"] == 4

    def test_a_trainer_that_was_renewed_in_the_middle_draws_otherwise_since(
        self, replay: Replay, run: Run
    ) -> None:
        run.write_config()
        sha256 = run.write_adapter("my_run.safetensors", 500)
        old = picture(prompt="a red circle", noise_draw=LEGACY)
        new = picture(prompt="a red circle", noise_draw=FLOAT32, adapter=sha256)
        run.write_sample(0, 0, trainer_jpeg(old), time_ms=OLD_TIME_MS)
        run.write_sample(500, 0, trainer_jpeg(new))
        replay()
        assert replay.facts["resolved"]["noise_draws"] == ["float32", "legacy"]
        assert replay.facts["summary"]["identical"] == 2

    @pytest.mark.parametrize(
        ("time_ms", "draw", "form"),
        [
            (OLD_TIME_MS, LEGACY, options_pb2.LOKR_FORM_WEIGHT),
            (OLD_TIME_MS, FLOAT32, options_pb2.LOKR_FORM_FACTORIZED),  # a clock that is wrong
            (1_784_500_000_000, LEGACY, options_pb2.LOKR_FORM_FACTORIZED),  # 2026-07-19
        ],
    )
    def test_the_form_of_a_lokr_follows_its_time(
        self, replay: Replay, run: Run, time_ms: int, draw: int, form: int
    ) -> None:
        run.network = {"type": "lokr"}
        run.write_config()
        sha256 = run.write_adapter("my_run.safetensors", 500)
        for step, adapter in ((0, ""), (500, sha256)):
            drawn = picture(prompt="a red circle", noise_draw=draw, adapter=adapter)
            run.write_sample(step, 0, trainer_jpeg(drawn), time_ms=time_ms)
        replay()
        (last,) = [request for request in replay.server.requests if request.loras]
        assert last.trainer.lokr_form == form


def test_the_base_model_is_found_by_its_name_or_assumed_aloud(replay: Replay, run: Run) -> None:
    run.model = {"name_or_path": "org/chroma-mini"}
    run.write_all(steps=(0,))
    replay()
    assert replay.facts["server"]["model"] == "chroma-mini"
    assert not any("Base model" in said for said in replay.facts["assumptions"])
    run.model = {"name_or_path": "/home/somebody/models/other.safetensors"}
    run.write_all(steps=(0,))
    replay()
    assert replay.facts["server"]["model"] == "chroma"
    assert any("'other'; taken for the server's model 'chroma'" in said for said in replay.facts["assumptions"])
    for name in ("report.json", "index.html"):
        assert "somebody" not in (replay.out / name).read_text("utf-8")
    assert "no model nothing" in replay("--model", "nothing", exit_code=8).stderr


def test_a_model_that_was_made_from_the_base_model_stands_for_it_aloud(replay: Replay, run: Run) -> None:
    run.model = {"name_or_path": "lodestones/Chroma1-Base"}
    run.write_all(steps=(0,))
    replay.server.models = ("chroma", "base-q8_0")
    replay.server.base_names = {"base-q8_0": "lodestones/Chroma1-Base"}
    replay()
    assert replay.facts["server"]["model"] == "base-q8_0"
    assert any("is the base of the server's model 'base-q8_0'" in said for said in replay.facts["assumptions"])


def test_environment_variables_are_shown_unresolved_unless_allowed(
    replay: Replay, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_THING", "circle")
    run.sample = {"prompts": ["a red ${MY_THING}", "a green square"]}
    run.write_config()
    for index, prompt in enumerate(["a red circle", "a green square"]):
        run.write_sample(0, index, trainer_jpeg(picture(prompt=prompt, seed=42 + index)))
    replay()
    assert replay.sample(0, 0)["resolved"]["prompt"] == "a red ${MY_THING}"
    assert "--allow-env MY_THING" in replay.sample(0, 0)["reason"]
    assert replay.facts["resolved"]["unresolved"] == ["MY_THING"]
    replay("--allow-env", "MY_THING")
    assert replay.facts["summary"]["identical"] == 2


@pytest.mark.parametrize(("suffix", "file_format"), [("png", "PNG"), ("webp", "WEBP")])
def test_samples_of_other_formats_are_encoded_as_the_trainer_encodes_them(
    replay: Replay, run: Run, suffix: str, file_format: str
) -> None:
    run.sample = {"format": suffix, "prompts": ["a red circle"]}
    run.write_config()
    file = io.BytesIO()
    picture(prompt="a red circle").save(file, file_format)
    run.write_sample(0, 0, file.getvalue(), suffix=suffix)
    replay()
    assert replay.sample(0, 0)["identical"]


def test_the_facts_are_plain_json_and_complete(replay: Replay, run: Run) -> None:
    run.write_all(steps=(0, 500))
    replay.server.retouch = blurred
    replay()
    text = (replay.out / "report.json").read_text("utf-8")
    assert not any(word in text for word in ("NaN", "Infinity", str(run.path.parent)))
    facts = json.loads(text)
    sample = replay.sample(500, 0)
    assert (
        sample["checkpoint_sha256"] == hashlib.sha256((run.path / "my_run.safetensors").read_bytes()).hexdigest()
    )
    assert 30 < sample["psnr_db"] < 100
    assert 0.9 < sample["ssim"] < 1
    assert not sample["identical"]
    assert [one["step"] for one in facts["curve"]] == [0, 500]
    assert facts["server"]["model_revision"] == "cd" * 32
    assert sample["resolved"]["noise_draw"] == "float32"
