"""Why two pictures differ: their facts, their pixels, and what would draw one again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chromarpc import parse_request_json
from chromarpc.pictures.a1111 import parameters_facts
from chromarpc.pictures.comfyui import comfyui_facts
from chromarpc.pictures.comparison import compare_facts, compare_pixels, difference_picture
from chromarpc.pictures.facts import ALWAYS_ASKED, PictureFacts, in_order
from chromarpc.pictures.opened import open_picture
from chromarpc.pictures.recorded import recorded_facts
from tests.client.picture_files import (
    A1111,
    COMFYUI,
    COMFYUI_CUSTOM,
    FORGE,
    RECORD,
    WORKFLOW,
    comfyui_webp,
    pixels,
    png_with,
    saved,
)


def changed(*path: Any, to: Any) -> PictureFacts:
    """Facts of the record with one value changed."""
    record = json.loads(json.dumps(RECORD))
    at = record
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = to
    return recorded_facts(json.dumps(record))


def differing(first: PictureFacts, second: PictureFacts) -> list[str]:
    return [f"{d.name}: {d.first} → {d.second}" for d in compare_facts(first, second) if d.differs]


def test_a_changed_field_is_one_line_by_the_requests_name() -> None:
    base = recorded_facts(json.dumps(RECORD))
    prompt = ("request", "prompts", 0)
    cases: list[tuple[tuple[Any, ...], Any, str]] = [
        ((*prompt, "guidance_scale"), 3.0, "guidance_scale: 4.0 → 3.0"),
        ((*prompt, "seed"), 43, "seed: 42 → 43"),
        ((*prompt, "sample_steps"), 30, "sample_steps: 25 → 30"),
        ((*prompt, "width"), 96, "width: 64 → 96"),
        ((*prompt, "neg"), "ugly", 'neg: "" → ugly'),
        (("served_model",), "chroma-mini", "model: chroma → chroma-mini"),
        (("model_revision",), "ef" * 32, f"model_revision: {'cd' * 32} → {'ef' * 32}"),
        (("adapters", 0, "sha256"), "ef" * 32, f"loras.0.sha256: {'ab' * 32} → {'ef' * 32}"),
        (("request", "loras", 0, "network_multiplier"), 0.5, "loras.0.network_multiplier: 1.0 → 0.5"),
        (("request", "loras"), [], "loras.0.path: job/l.safetensors → none"),
        (("request", "profile"), "fp8", "profile: reference → fp8"),
        (("request", "noise_draw"), "NOISE_DRAW_LEGACY", "noise_draw: float32 → legacy"),
        (("versions", "torch"), "2.11.0", "versions.torch: 2.13.0 → 2.11.0"),
        (("device",), "NVIDIA H200", "device: NVIDIA H100 80GB HBM3 → NVIDIA H200"),
    ]
    for path, value, line in cases:
        assert differing(base, changed(*path, to=value)) == [line]
    assert differing(base, changed("request", "loras", 0, "path", to="other/l.sft")) == []


def test_differences_come_in_the_order_of_how_much_they_explain() -> None:
    asked = ["device", "versions.torch", "neg", "loras.0.network_multiplier", "guidance_scale", "sample_steps",
             "noise_draw", "seed", "height", "width", "profile", "loras.10.sha256", "loras.2.sha256",
             "model_revision", "model"]  # fmt: skip
    assert in_order(asked) == [
        "model", "model_revision", "loras.2.sha256", "loras.10.sha256", "profile", "width", "height", "seed",
        "noise_draw", "sample_steps", "guidance_scale", "loras.0.network_multiplier", "neg", "versions.torch",
        "device",
    ]  # fmt: skip


def test_what_one_program_does_not_say_is_unknown_and_no_difference() -> None:
    ours = recorded_facts(json.dumps(RECORD))
    theirs = comfyui_facts({"prompt": json.dumps(COMFYUI)})
    assert theirs is not None
    found = {difference.name: difference for difference in compare_facts(ours, theirs)}
    assert set(ALWAYS_ASKED) <= found.keys()
    for name in ("model_revision", "profile", "noise_draw", "versions", "device", "loras.0.sha256"):
        assert found[name].second == "unknown"
        assert not found[name].differs
    assert found["versions"].first == "chromarpc 0.1.0, torch 2.13.0"
    assert not found["sampler"].differs  # Euler steps by another name
    assert found["scheduler"].differs
    assert found["guidance_scale"].line.startswith("guidance_scale: 4.0 → 3.5")


def test_pixels_are_measured_and_their_difference_drawn() -> None:
    one, other = saved(pixels((100, 100, 100)), "PNG"), saved(pixels((100, 104, 100)), "PNG")
    assert compare_pixels(one, one).line == "pixels: the same, and so is every byte"
    found = compare_pixels(one, other)
    assert found.similarity is not None
    assert found.similarity.largest_difference == 4
    assert found.similarity.psnr_db == pytest.approx(40.8599, abs=1e-3)
    assert difference_picture(one, other).getpixel((0, 0)) == (0, 32, 0)
    assert compare_pixels(one, saved(pixels(size=(32, 64)), "PNG")).sizes_differ


def test_what_would_draw_a_foreign_picture_is_a_request() -> None:
    for facts in (
        comfyui_facts({"prompt": json.dumps(COMFYUI)}),
        comfyui_facts({"prompt": json.dumps(COMFYUI_CUSTOM)}),
        comfyui_facts({"workflow": json.dumps(WORKFLOW)}),
        parameters_facts(A1111),
        parameters_facts(FORGE),
    ):
        assert facts is not None
        parsed = parse_request_json(json.dumps(facts.request))
        assert parsed.unknown == ()
        assert parsed.request.model == "chroma"
        assert parsed.request.prompts[0].seed == facts.facts["seed"].value


def test_the_files_own_size_counts_for_pictures_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_with({"prompt": COMFYUI}, pixels(size=(128, 64))))
    facts = open_picture(tmp_path / "a.png").facts
    assert facts.facts["width"].value == 128
    assert any("width is 128" in remark for remark in facts.remarks)
    (tmp_path / "b.webp").write_bytes(comfyui_webp(COMFYUI))
    assert open_picture(tmp_path / "b.webp").facts.facts["seed"].value == 43
