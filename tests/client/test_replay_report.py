"""The report's page: whole in itself, safe whatever a run's texts say, light enough for hundreds of samples."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chromarpc.replay.curve import curve_svg
from chromarpc.replay.facts import count_line, verdict_line
from chromarpc.replay.report_page import write_report
from tests.client.replay_fake_server import picture, trainer_jpeg

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)>\u202etxt' onload='"
CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def sample(
    step: int, index: int, *, text: str = "a cat", reason: str | None = None, psnr: float = 51.2
) -> dict[str, Any]:
    drawn = reason is None
    return {
        "step": step, "index": index, "file": f"samples/1__{step:09d}_{index}.jpg",
        "identical": drawn and psnr >= 100, "same_pixels": drawn and psnr >= 100,
        "psnr_db": psnr if drawn else None, "ssim": 0.99 if drawn else None,
        "largest_difference": 3 if drawn else None, "below_min_psnr": drawn and psnr < 30, "reason": reason,
        "checkpoint": text, "checkpoint_kept": drawn, "checkpoint_sha256": None, "trainer_sha256": "ab",
        "trainer_readable": True, "picture": f"pictures/{step}_{index}.jpg" if drawn else None,
        "picture_sha256": None, "seconds": 1.0, "warnings": [text],
        "resolved": {
            "prompt": text, "negative_prompt": text, "requested": [64, 64], "width": 64, "height": 64, "seed": 42,
            "steps": 2, "guidance_scale": 4, "network_multiplier": 0.5, "quantize": True, "qtype": text,
            "quantize_te": True, "dtype": "bf16", "noise_draw": "float32", "lokr_form": None,
        },
    }  # fmt: skip


def facts_of(samples: list[dict[str, Any]], *, text: str = "my run") -> dict[str, Any]:
    drawn = [one["psnr_db"] for one in samples if one["psnr_db"] is not None]
    summary: dict[str, Any] = {
        "samples": len(samples), "drawn": len(drawn), "not_drawn": len(samples) - len(drawn),
        "reasons": {text: len(samples) - len(drawn)}, "identical": 0, "below_min_psnr": 0, "min_psnr_db": 30.0,
        "median_psnr_db": 51.2 if drawn else None, "lowest_psnr_db": 44.0 if drawn else None,
        "median_ssim": 0.99 if drawn else None, "not_asked_for": 0,
    }  # fmt: skip
    steps = sorted({one["step"] for one in samples if one["psnr_db"] is not None})
    return {
        "client_version": "1",
        "summary": {"line": count_line(summary), "verdict": verdict_line(summary)} | summary,
        "run": {"name": text, "base_model": text, "network_type": text},
        "resolved": {
            "quantize": True, "qtype": text, "quantize_te": True, "dtype": text, "noise_draws": ["float32"],
            "lokr_forms": [], "unresolved": [text],
        },
        "server": {
            "version": text, "device": text, "served_model": text, "base_checkpoint": text, "model_revision": "cd",
            "profile": "preview", "versions": {text: text},
        },
        "calibration": {"sentence": text, "matches": False}, "assumptions": [text],
        "curve": [{"step": step, "drawn": 1, "median_psnr_db": 51.2, "lowest_psnr_db": 44.0} for step in steps],
        "ignored": [{"file": text, "reason": text}], "samples": samples,
    }  # fmt: skip


def written(out: Path, facts: dict[str, Any], **more: Any) -> str:
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    ours = trainer_jpeg(picture(prompt="ours"))
    for one in facts["samples"]:
        if one["picture"]:
            (out / one["picture"]).write_bytes(ours)
    theirs = trainer_jpeg(picture(prompt="theirs"))
    return write_report(facts, out, theirs=lambda name: theirs, **more).read_text("utf-8")


def test_texts_of_strangers_are_only_text(tmp_path: Path) -> None:
    facts = facts_of([sample(0, 0, text=HOSTILE), sample(0, 1, text=HOSTILE, reason=HOSTILE)], text=HOSTILE)
    page = Page(written(tmp_path, facts))
    assert len(page.all("script")) == 1
    assert all((image.get("src") or "data:").startswith("data:") for image in page.all("img"))
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "alert(1)" in page.text
    assert "\u202e" not in page.text


def test_the_page_is_whole_in_itself_and_may_load_nothing(tmp_path: Path) -> None:
    text = written(tmp_path, facts_of([sample(0, 0), sample(250, 0)]))
    page = Page(text)
    (policy,) = [one["content"] or "" for one in page.all("meta") if one.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for tag in ("style", "script"):
        inside = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert inside is not None
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not page.all("link")
    assert not [attributes for _, attributes in page.elements if "style" in attributes]
    assert not re.findall(r"https?://|url\(", text)


def test_each_pair_has_both_pictures_and_their_difference(tmp_path: Path) -> None:
    text = written(tmp_path, facts_of([sample(0, 0), sample(0, 1, reason="checkpoint deleted")]))
    page = Page(text)
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions == ["the trainer’s", "ours", "difference × 8", "the trainer’s"]
    assert "checkpoint deleted" in page.text
    assert all(image["loading"] == "lazy" and image["alt"] for image in page.all("img") if "src" in image)
    assert [button["aria-label"] for button in page.all("button") if button.get("class") == "open"] == [
        "Compare Step 0, sample 0"
    ]


def test_a_large_report_has_thumbnails_and_the_pictures_beside_it(tmp_path: Path) -> None:
    facts = facts_of([sample(0, 0), sample(250, 0), sample(500, 0, reason="checkpoint deleted")])
    whole = written(tmp_path / "small", facts)
    large = written(tmp_path / "large", facts, max_page_bytes=1000)
    assert 'data-ours="-"' in whole
    cards = [one for one in Page(large).all("article") if one.get("data-ours")]
    for card in cards:
        for side in ("data-theirs", "data-ours"):
            assert (tmp_path / "large" / (card[side] or "")).is_file()
    assert "lie in the folder <code>pictures</code>" in large
    assert "img-src data: 'self' file:;" in large


@pytest.mark.slow
def test_five_hundred_samples_stay_small(tmp_path: Path) -> None:
    facts = facts_of([sample(step, index) for step in range(0, 12_500, 250) for index in range(10)])
    text = written(tmp_path, facts, max_page_bytes=10_000)
    assert len(text) < 25_000_000
    assert len(Page(text).all("article")) == 500


def test_the_curve_names_every_point_and_the_limit() -> None:
    samples = [sample(0, 0, psnr=100.0), sample(250, 0, psnr=51.2), sample(500, 0, psnr=12.0)]
    steps = [{"step": one["step"], "median_psnr_db": one["psnr_db"]} for one in samples]
    svg = curve_svg(samples, steps, 30.0)
    assert re.findall("<title>(.*?)</title>", svg) == [
        "step 0, sample 0: identical",
        "step 250, sample 0: 51.2 dB",
        "step 500, sample 0: 12.0 dB",
    ]
    assert "limit 30 dB" in svg
    assert "no curve" in curve_svg([], [], 30.0)


def test_a_curve_of_one_step_and_of_very_many_is_drawn() -> None:
    one = curve_svg([sample(0, 0)], [{"step": 0, "median_psnr_db": 51.2}], 30.0)
    assert "<circle" in one
    many = [{"step": step, "median_psnr_db": 40.0} for step in range(0, 100_000, 250)]
    labels = re.findall(r'text-anchor="middle">(\d+)<', curve_svg([], many, 30.0))
    assert (len(labels), labels[0], labels[-1]) == (9, "0", "99750")


@pytest.mark.parametrize(
    ("summary", "line"),
    [
        ({"drawn": 0}, "No sample could be drawn again."),
        ({"drawn": 3, "identical": 3}, "Every picture is the trainer's own, byte for byte."),
        ({"drawn": 1, "identical": 1}, "The picture is the trainer's own, byte for byte."),
        (
            {"drawn": 3, "identical": 1, "below_min_psnr": 1, "median_psnr_db": 51.0, "lowest_psnr_db": 20.0},
            "Some differ visibly: 1 identical to the trainer's file, byte for byte; median 51.0 dB, "
            "lowest 20.0 dB; 1 below 30 dB.",
        ),
    ],
)
def test_the_verdict_is_a_sentence(summary: dict[str, Any], line: str) -> None:
    assert verdict_line({"identical": 0, "below_min_psnr": 0, "min_psnr_db": 30.0} | summary) == line


def test_the_page_and_the_facts_are_written_together(tmp_path: Path) -> None:
    facts = facts_of([sample(0, 0)])
    written(tmp_path, facts)
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == facts


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(
    ("max_page_bytes", "link"), [(25_000_000, ""), (25_000_000, "#s250-1"), (1000, "#s250-1")]
)
def test_a_browser_runs_the_page_without_a_complaint(tmp_path: Path, max_page_bytes: int, link: str) -> None:
    assert CHROMIUM is not None
    facts = facts_of([sample(0, 0, text=HOSTILE), sample(250, 1), sample(500, 0, reason=HOSTILE)], text=HOSTILE)
    written(tmp_path, facts, max_page_bytes=max_page_bytes)
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom",
         f"file://{tmp_path / 'index.html'}{link}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr  # a refused picture, style or script would be told here
    page = Page(shown.stdout)
    assert "scripted" in (page.all("body")[0].get("class") or "")
    (dialog,) = page.all("dialog")
    assert ("open" in dialog) is bool(link)
    assert {"class": "ours", "alt": "ours"}.items() <= page.all("img")[-1].items()
    assert bool(page.all("img")[-1].get("src")) is bool(link)
