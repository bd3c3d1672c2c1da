"""`chromarpc explain`, `compare`, and `generate --json PICTURE`: what they print, send and answer to the shell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from chromarpc import Lora, png_text
from chromarpc.cli import app
from chromarpc.request import build_request
from tests.client.client_fake_server import FakeServer, png
from tests.client.picture_files import A1111, COMFYUI, FORGE, RECORD, pixels, png_with, saved, with_comment

RUN = Path(__file__).parents[1] / "goldens" / "preview_runs" / "exact"


class Shell:
    """Runs the command against one server, in an empty folder."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server

    def __call__(self, *arguments: str, text_in: str | None = None) -> Any:
        result = CliRunner().invoke(
            app, list(arguments), input=text_in, env={"CHROMARPC_TARGET": self.server.target}
        )
        assert "Traceback" not in result.stderr
        return result


@pytest.fixture
def shell(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(server)


def record(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(RECORD))
    made["request"]["prompts"][0].update(changes)
    return made


def write(name: str, content: dict[str, Any] | str = RECORD, colour: int = 100) -> None:
    """A PNG of ours, with a record, or of others, with other texts."""
    texts = {"chromarpc": content} if content is not RECORD and "request" in content else content
    texts = {"chromarpc": RECORD} if content is RECORD else texts
    assert isinstance(texts, dict)
    Path(name).write_bytes(png_with(texts, pixels((colour, 100, 100))))


# Explaining


def test_a_picture_of_ours_is_explained_with_the_way_to_draw_it_again(shell: Shell) -> None:
    write("my circle.png")
    result = shell("explain", "my circle.png")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "my circle.png: PNG, 64×64, drawn by chromarpc 0.1.0"
    assert '  prompt: a <cät>\\n& "dog"' in lines
    assert f"  loras.0.sha256: {'ab' * 32}" in lines
    assert "  device: NVIDIA H100 80GB HBM3" in lines
    assert "  chromarpc generate --json 'my circle.png'" in lines
    assert not shell.server.requests


@pytest.mark.parametrize(
    ("data", "program"),
    [
        (png_with({"prompt": COMFYUI, "workflow": {"nodes": []}}), "ComfyUI"),
        (png_with({"parameters": A1111}), "AUTOMATIC1111 or Forge v1.10.1"),
        (with_comment(A1111, "JPEG"), "AUTOMATIC1111 or Forge v1.10.1"),
        (with_comment(FORGE, "WEBP"), "Forge f2.0.1v1.10.1-previous"),
    ],
)
def test_the_checklist_is_answered_and_what_nobody_says_is_unknown(
    shell: Shell, data: bytes, program: str
) -> None:
    Path("a.bin").write_bytes(data)
    result = shell("explain", "a.bin")
    assert result.exit_code == 0
    assert f"drawn by {program}" in result.stdout.splitlines()[0]
    facts = json.loads(shell("explain", "a.bin", "--json").stdout)["facts"]
    for name in ("width", "height", "sample_steps", "scheduler", "guidance_scale", "guidance"):
        assert facts[name]["value"] is not None, name
    assert facts["loras.0.network_multiplier"]["value"] in (0.8, 0.25)
    for name in ("loras.0.placement", "profile", "noise_draw", "device"):
        assert facts[name]["value"] is None
        assert f"  {name}: unknown" in result.stdout
    request = shell("explain", "a.bin", "--request").stdout
    Path("request.json").write_text(request)
    assert shell("generate", "--json", "request.json").exit_code == 0
    assert shell.server.requests[0].prompts[0].seed == facts["seed"]["value"]


def test_what_says_nothing_or_is_no_picture_exits_2(shell: Shell) -> None:
    Path("plain.png").write_bytes(png())
    Path("text.png").write_text("no picture")
    for name, said in (
        ("plain.png", "does not say what it was drawn with"),
        ("text.png", "text.png: is no PNG"),
        ("none.png", "none.png: cannot be read: No such file"),
    ):
        result = shell("explain", name)
        assert result.exit_code == 2
        assert said in result.stdout + result.stderr


def test_what_a_picture_says_steers_no_terminal(shell: Shell) -> None:
    write("a.png", record(prompt="\x1b[2Ja\nb"))
    for command in (("explain", "a.png"), ("compare", "a.png", "a.png", "--all")):
        assert "\x1b" not in shell(*command).stdout


def test_a_picture_of_ours_that_lost_its_record_is_told_by_its_text(shell: Shell) -> None:
    text = ("a cat\nSteps: 3, Sampler: flowmatch, CFG scale: 4, Seed: 7, Size: 64x64, Model: chroma-mini, "
            'Lora 0: "a, b.safetensors x 0.5", Profile: reference, Version: chromarpc 0.1.0')  # fmt: skip
    Path("a.jpg").write_bytes(with_comment(text, "JPEG"))
    facts = json.loads(shell("explain", "a.jpg", "--json").stdout)
    assert facts["drawn_by"] == "chromarpc 0.1.0"
    assert facts["facts"]["loras.0.path"]["value"] == "a, b.safetensors"
    assert facts["facts"]["profile"]["value"] == "reference"


# Comparing


def test_equal_pictures_exit_0_and_all_fields_are_told_on_request(shell: Shell) -> None:
    write("a.png")
    shutil.copy("a.png", "b.png")
    result = shell("compare", "a.png", "b.png")
    assert (result.exit_code, result.stdout) == (0, "pixels: the same, and so is every byte\n")
    told = shell("compare", "a.png", "b.png", "--all")
    assert told.exit_code == 0
    assert "seed: 42" in told.stdout.splitlines()


def test_each_field_that_differs_is_a_line_and_the_exit_code_is_1(shell: Shell) -> None:
    write("a.png")
    write("b.png", record(guidance_scale=3.0, seed=43), colour=110)
    result = shell("compare", "a.png", "b.png", "--difference", "d.png")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:2] == ["seed: 42 → 43", "guidance_scale: 4.0 → 3.0"]
    assert result.stdout.splitlines()[2].startswith("pixels: PSNR 32.9")
    assert len(result.stdout.splitlines()) == 3
    with Image.open("d.png") as picture:
        assert picture.getpixel((0, 0)) == (80, 0, 0)
    said = json.loads(shell("compare", "a.png", "b.png", "--json").stdout)
    assert said["differences"] == ["seed", "guidance_scale"]
    assert said["pixels"]["largest_difference"] == 10


def test_other_pixels_of_the_same_settings_are_different(shell: Shell) -> None:
    write("a.png")
    write("b.png", colour=101)
    assert shell("compare", "a.png", "b.png").exit_code == 1
    Path("c.png").write_bytes(saved(pixels(size=(32, 32)), "PNG"))
    result = shell("compare", "c.png", "a.png", "--difference", "d.png")
    assert result.exit_code == 1
    assert "64×64" in result.stdout
    assert not Path("d.png").exists()


def test_pictures_without_records_are_compared_by_their_pixels(shell: Shell) -> None:
    Path("a.png").write_bytes(png())
    Path("b.png").write_bytes(png(1))
    assert shell("compare", "a.png", "a.png").exit_code == 0
    assert shell("compare", "a.png", "b.png").exit_code == 1


@pytest.mark.parametrize("other", ["none.png", "text.png", "broken.png", "folder"])
def test_what_cannot_be_used_exits_2(shell: Shell, other: str) -> None:
    write("a.png")
    Path("text.png").write_text("no picture")
    broken = Path("a.png").read_bytes()
    at = broken.index(b"IDAT") + 8
    Path("broken.png").write_bytes(broken[:at] + b"\xff" * 8 + broken[at + 8 :])
    Path("folder").mkdir()
    for pair in (("a.png", other), (other, "a.png")):
        assert shell("compare", *pair).exit_code == 2, other
    write("b.png", colour=120)
    assert shell("compare", "a.png", "b.png", "--difference", "no/such/d.png").exit_code == 2


def test_ours_beside_comfyuis_and_a1111s_says_what_differs_and_what_is_unknown(shell: Shell) -> None:
    write("ours.png")
    Path("comfy.png").write_bytes(png_with({"prompt": COMFYUI}))
    Path("forge.webp").write_bytes(with_comment(FORGE, "WEBP"))
    result = shell("compare", "ours.png", "comfy.png")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert "loras.0.path: job/l.safetensors → styles/ink.safetensors" in lines
    assert "sample_steps: 25 → 20" in lines
    assert any(line.startswith("loras.0.network_multiplier: 1.0 → 0.8") for line in lines)
    assert any(line.startswith("scheduler: flowmatch → beta") for line in lines)
    assert "profile: reference → unknown" in lines
    assert not any(line.startswith("sampler:") for line in lines)
    assert shell("compare", "comfy.png", "forge.webp").exit_code == 1


# A trainer's sample


def test_a_sample_is_told_by_its_runs_folder(shell: Shell) -> None:
    run = Path("run")
    (run / "samples").mkdir(parents=True)
    shutil.copy(RUN / "config.yaml", run)
    name = "1795649067847__000000250_1.jpg"
    (run / "samples" / name).write_bytes(saved(pixels(size=(320, 192)), "JPEG"))
    (run / "hlw_outlines_000000250.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    said = json.loads(shell("explain", f"run/samples/{name}", "--run", "run", "--json").stdout)
    facts = {key: fact["value"] for key, fact in said["facts"].items()}
    assert said["drawn_by"] == "ai-toolkit"
    assert (facts["width"], facts["height"], facts["seed"], facts["sample_steps"]) == (320, 192, 7, 8)
    assert facts["prompt"] == "a hlw medium red circle in the middle on a black background"
    assert (facts["trainer.qtype"], facts["loras.0.placement"]) == ("qfloat8", "beside")
    assert facts["loras.0.path"] == "hlw_outlines_000000250.safetensors"
    assert facts["loras.0.sha256"] is not None
    assert (said["request"]["trainer"]["dtype"], said["request"]["model"]) == ("bf16", "chroma-mini")
    write("ours.png", record(seed=7, sample_steps=8))
    lines = shell("compare", f"run/samples/{name}", "ours.png", "--run", "run").stdout.splitlines()
    assert any(line.startswith("profile: preview-exact → reference") for line in lines)
    assert not any(line.startswith("seed:") for line in lines)


def test_a_picture_that_is_no_sample_of_the_run_says_so(shell: Shell) -> None:
    Path("run").mkdir()
    Path("a.jpg").write_bytes(saved(pixels(), "JPEG"))
    result = shell("explain", "a.jpg", "--run", "run")
    assert result.exit_code == 2
    assert "this is no run folder of ai-toolkit" in result.stdout
    shutil.copy(RUN / "config.yaml", "run")
    assert "a.jpg is no sample of this run" in shell("explain", "a.jpg", "--run", "run").stdout


# Drawing again


def test_options_change_just_what_they_say(shell: Shell) -> None:
    made = record()
    made["request"] |= {
        "profile": "preview",
        "trainer": {"qtype": "int8", "dtype": "bfloat16", "quantize": True},
        "output": {"format": "IMAGE_FORMAT_JPEG", "quality": 80},
    }
    write("a.png", made)
    assert shell("generate", "--json", "a.png", "-o", "same.jpg").exit_code == 0
    changes = ("--seed", "43", "--trainer-qtype", "qint8", "--lora", "k.safetensors:0.3", "--model", "chroma-mini")
    assert shell("generate", "a dog", "--json", "a.png", *changes, "-o", "b.png").exit_code == 0
    same, other = shell.server.requests
    assert same.prompts[0].prompt == 'a <cät>\n& "dog"'
    assert (same.output.quality, same.trainer.qtype, same.profile) == (80, "int8", "preview")
    assert list(other.loras) == list(build_request("a", loras=Lora("k.safetensors", 0.3)).loras)
    assert (other.prompts[0].prompt, other.prompts[0].seed, other.prompts[0].sample_steps) == ("a dog", 43, 25)
    assert (other.trainer.qtype, other.trainer.dtype, other.trainer.quantize) == ("qint8", "bfloat16", True)
    assert (other.model, other.profile, other.noise_draw) == ("chroma-mini", "preview", same.noise_draw)
    assert other.output == build_request("a", output_format="png").output


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "old"])
def test_every_kind_of_our_pictures_is_drawn_again(shell: Shell, kind: str) -> None:
    text = json.dumps(RECORD)
    if kind == "PNG":
        write("a")
    elif kind == "old":  # as the client wrote it, behind the pixels
        old = json.dumps(RECORD | {"job_id": "1", "client_version": "0.1.0", "prompt_index": 0})
        Path("a").write_bytes(png_text.insert(saved(pixels(), "PNG"), {"parameters": "x", "chromarpc": old}))
    else:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        xmp = f'<c:record xmlns:c="urn:chromarpc:picture">{escaped}</c:record>'
        Path("a").write_bytes(saved(pixels(), kind, xmp=xmp.encode()))
    result = shell("generate", "--json", "a", "--seed", "43")
    assert result.exit_code == 0, result.stderr
    assert (shell.server.requests[0].prompts[0].seed, shell.server.requests[0].prompts[0].width) == (43, 64)
    assert shell("explain", "a").exit_code == 0


def test_standard_input_may_be_a_picture(shell: Shell) -> None:
    write("a.png")
    result = CliRunner().invoke(
        app,
        ["generate", "--json", "-", "--seed", "5", "-o", "b.jpg"],
        input=Path("a.png").read_bytes(),
        env={"CHROMARPC_TARGET": shell.server.target},
    )
    assert result.exit_code == 0, result.stderr
    assert shell.server.requests[0].prompts[0].seed == 5


def test_other_content_than_recorded_is_a_warning_before_it_draws(shell: Shell) -> None:
    made = record()
    made["adapters"][0]["sha256"] = "ef" * 32
    made["model_revision"] = "12" * 32
    write("a.png", made)
    result = shell("generate", "--json", "a.png", "-o", "b.png")
    assert result.exit_code == 0
    changed = "has other content than recorded"
    assert f"warning: job/l.safetensors {changed}: abababababab, not efefefefefef" in result.stderr
    assert f"#sha256={'ef' * 32}" in result.stderr
    assert f"warning: the model {changed}: cdcdcdcdcdcd, not 121212121212" in result.stderr
    quiet = shell("generate", "--json", "a.png", "--lora", "k", "--model", "chroma", "-o", "b.png")
    assert "other content" not in quiet.stderr
    write("a.png")
    assert "other content" not in shell("generate", "--json", "a.png", "-o", "b.png").stderr


def test_urls_in_a_picture_are_shown_and_fetched_only_if_confirmed(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = record()
    made["request"]["loras"] = [{"path": "https://example.org/l.safetensors"}]
    write("a.png", made)
    refused = shell("generate", "--json", "a.png", "-o", "b.png")
    assert refused.exit_code == 2
    assert "  https://example.org/l.safetensors" in refused.stderr.splitlines()
    assert "--fetch-urls" in refused.stderr
    assert shell("generate", "--json", "a.png", "--detach").exit_code == 2
    assert not shell.server.requests
    assert shell("generate", "--json", "a.png", "--lora", "own.safetensors", "-o", "b.png").exit_code == 0
    shown = shell("generate", "--json", "a.png", "--fetch-urls", "-o", "b.png")
    assert (shown.exit_code, len(shell.server.requests)) == (0, 2)
    assert "  https://example.org/l.safetensors" in shown.stderr.splitlines()
    monkeypatch.setattr("chromarpc.cli.recorded._can_answer", lambda: True)
    assert shell("generate", "--json", "a.png", "-o", "b.png", text_in="n\n").exit_code == 2
    assert len(shell.server.requests) == 2
    assert shell("generate", "--json", "a.png", "-o", "b.png", text_in="y\n").exit_code == 0
    assert len(shell.server.requests) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a", "b", "--json", "a.png"), "one PROMPT at most"),
        (("--json", "comfy.png"), "ComfyUI drew this picture; give it as --comfyui comfy.png"),
        (("--json", "a1111.png"), "chromarpc explain --request"),
        (("--json", "plain.png"), "does not say what it was drawn with"),
        (("--json", "odd.png"), "record"),
        (("--json", "a.png", "--format", "webp", "-o", "b.png"), "the name says png"),
        (("--json", "a.png", "--preview-every", "3"), "--preview-dir"),
    ],
)
def test_what_cannot_be_drawn_again_exits_2(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    write("a.png")
    Path("plain.png").write_bytes(png())
    Path("comfy.png").write_bytes(png_with({"prompt": COMFYUI}))
    Path("a1111.png").write_bytes(png_with({"parameters": A1111}))
    Path("odd.png").write_bytes(png_with({"chromarpc": {"request": {"prompts": []}}}))
    result = shell("generate", *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not shell.server.requests


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jpg", saved(pixels(), "JPEG"), "a.jpg: is a picture (JPEG) that does not say"),
        ("a.jpg", saved(pixels(), "JPEG")[:50], "a.jpg: is a picture (JPEG) that cannot be read"),
        ("a.webp", saved(pixels(), "WEBP"), "a.webp: is a picture (WebP) that does not say"),
        ("a.gif", saved(pixels(), "GIF"), "a.gif: is a picture (GIF)"),
        ("a.bmp", saved(pixels(), "BMP"), "a.bmp: is a picture (BMP)"),
        ("a.bin", b"\xff\x00\xfe", "is neither text nor a PNG"),
        ("a.json", b" \n", "a.json: is empty"),
    ],
)
def test_files_that_hold_no_request_are_told_apart(shell: Shell, name: str, data: bytes, said: str) -> None:
    Path(name).write_bytes(data)
    result = shell("generate", "--json", name)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
