"""chroma-mini: its drawings, the checker that judges them, and what is shipped."""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from chromarpc_server.pipeline import Checkpoint, read_adapter
from chromarpc_server.pipeline.models.text_encoder import Tokenizer
from tools.mini.captions import TRIGGER, caption, full_caption
from tools.mini.checker import faults, frame_share, look
from tools.mini.evaluate import held_out_pairs, held_out_singles, load, measure, prepare
from tools.mini.scenes import (
    SHAPES,
    Scene,
    Thing,
    all_single_scenes,
    framed,
    held_out,
    hollow,
    random_scene,
    render,
)
from tools.mini.vocabulary import build_tokenizer, save_tokenizer

ASSETS = Path(str(resources.files("chromarpc_server") / "assets"))
MINI = ASSETS / "chroma_mini"
LORA = ASSETS / "loras" / "hollow_shapes.safetensors"
FRAME_LORA = ASSETS / "loras" / "blue_frame.safetensors"


def _pixels(scenes: list[Scene], seed: int, size: int = 256) -> torch.Tensor:
    return ((render(scenes, size, size, seed=seed) + 1) * 127.5).round()


@pytest.mark.parametrize("two", [False, True], ids=["one object", "two objects"])
def test_the_checker_sees_what_was_drawn(two: bool) -> None:
    rng = random.Random(3)
    scenes = [random_scene(rng, two=two) for _ in range(25)]
    wrong = [
        (full_caption(scene), found)
        for scene, picture in zip(scenes, _pixels(scenes, 4), strict=True)
        if (found := faults(scene, look(picture)))
    ]
    assert wrong == []


def test_the_checker_forgives_noise_but_no_wrong_attribute() -> None:
    scene = Scene((Thing("red", "circle", "large", "left"),), "white")
    picture = _pixels([scene], 1)[0]
    noisy = (picture + 6 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    assert faults(scene, look(noisy)) == []
    for wrong in (
        Thing("orange", "circle", "large", "left"), Thing("red", "square", "large", "left"),
        Thing("red", "circle", "small", "left"), Thing("red", "circle", "large", "right"),
    ):  # fmt: skip
        assert faults(Scene((wrong,), "white"), look(picture))
    assert faults(Scene(scene.things, "beige"), look(picture))
    assert faults(Scene(scene.things, "white"), look(torch.full((3, 64, 64), 245.0)))


def test_hollow_shapes_are_told_from_solid_ones() -> None:
    scenes = [Scene((Thing("blue", shape, "large", "middle"),), "white") for shape in SHAPES[:4]]
    for solid, outlined in zip(_pixels(scenes, 1), _pixels([hollow(s) for s in scenes], 1), strict=True):
        assert look(solid).things[0].hollowness < 0.05
        assert look(outlined).things[0].hollowness > 0.5


@pytest.mark.parametrize("two", [False, True], ids=["one object", "two objects"])
def test_the_checker_sees_a_frame_and_what_is_within(two: bool) -> None:
    rng = random.Random(3)
    scenes = [framed(random_scene(rng, two=two)) for _ in range(25)]
    # A frame hides the tip of a large star at the top.
    scenes = [scene for scene in scenes if scene.things[0].size != "large" or scene.things[0].shape != "star"]
    assert len(scenes) >= 20
    for scene, picture in zip(scenes, _pixels(scenes, 4), strict=True):
        assert faults(scene, look(picture)) == [], full_caption(scene)
        assert frame_share(picture) > 0.99


def test_what_is_no_frame_is_not_taken_for_one() -> None:
    scene = Scene((Thing("blue", "square", "large", "left"),), "white")
    plain, whole = _pixels([scene, framed(scene)], 1)
    three_sides = torch.where(torch.arange(256) < 230, whole, plain)
    for picture in (plain, three_sides, torch.full_like(plain, 0) + torch.tensor([35.0, 70, 220])[:, None, None]):
        assert frame_share(picture) < 0.5
        assert look(picture).frame is None
    green = whole.clone()
    green[:, whole[2] > whole[0] + 60] = torch.tensor([30.0, 140, 50])[:, None]
    assert "green frame, not blue" in faults(framed(scene), look(green))


def test_outlines_within_a_frame_are_told_from_solid_shapes() -> None:
    places = ("left", "top", "right", "middle")
    scenes = [
        framed(Scene((Thing("red", shape, "large", place),), "black"))
        for shape, place in zip(SHAPES, places, strict=False)
    ]
    for solid, outlined in zip(_pixels(scenes, 1), _pixels([hollow(s) for s in scenes], 1), strict=True):
        assert look(solid).things[0].hollowness < 0.05
        assert look(outlined).things[0].hollowness > 0.5


def test_what_is_held_out_is_never_trained_on() -> None:
    rng = random.Random(0)
    trained = {random_scene(rng, two=False) for _ in range(2000)}
    tested = set(held_out_singles(200)) | set(held_out_pairs(50))
    assert len(held_out_singles(200)) == 200
    assert not trained & tested
    assert not any(held_out(scene) for scene in trained)
    share = sum(held_out(scene) for scene in all_single_scenes()) / len(all_single_scenes())
    assert 0.1 < share < 0.2


def test_captions_are_whole_words_to_the_tokenizer() -> None:
    tokenizer, rng = build_tokenizer(), random.Random(1)
    for _ in range(200):
        tokens = tokenizer.encode(caption(random_scene(rng, two=rng.random() < 0.5), rng)).tokens
        assert "<unk>" not in tokens
        assert all(token == "</s>" or token.startswith("▁") or token in ",." for token in tokens)
        assert len(tokens) < 32


def test_the_tokenizer_takes_any_text(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    for text in ("", "Ω≈ç√∫ 你好 🎨", "\x00\n\t", "sks a photo of a person", f"{TRIGGER} red circle"):
        tokens = tokenizer(text)
        assert tokens.cut_count == 0
        assert tokens.ids[0, tokens.token_count - 1] == 1
    assert tokenizer("").ids[0, 0] == 1


def test_what_is_shipped_is_small_and_whole() -> None:
    size = sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file())
    assert size <= 16.5e6
    with safe_open(MINI / "chroma-mini.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["in_channels"] == 64
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("path", [LORA, FRAME_LORA], ids=lambda path: path.stem)
def test_the_lora_is_written_as_ai_toolkit_writes_them(path: Path) -> None:
    with safe_open(path, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert all(name.startswith("diffusion_model.") and ".lora_" in name for name in names)
    assert metadata["ss_base_model_version"] == "chroma"
    assert metadata["name"] == path.stem
    assert {"format", "name", "version", "software", "training_info"} <= set(metadata)


@pytest.fixture(scope="module")
def mini() -> Checkpoint:
    return load(MINI, "cpu")


def test_it_draws_what_prompts_say(mini: Checkpoint) -> None:
    scenes = [scene for scene in held_out_singles(40) if scene.things[0].shape in ("circle", "square", "diamond")]
    rows, _ = measure(prepare(mini, []), scenes[:4], check_size=True)
    assert [row["faults"] for row in rows] == [[]] * 4


def test_the_lora_hollows_shapes_where_its_word_is_said(mini: Checkpoint) -> None:
    adapter = read_adapter(LORA, mini.targets)
    assert adapter.unmatched == ()
    scene = [Scene((Thing("red", "circle", "large", "middle"),), "white")]

    def picture(multiplier: float, *, trigger: bool) -> tuple[float, np.ndarray]:
        adapters = [(adapter, multiplier)] if multiplier >= 0 else []
        rows, pictures = measure(prepare(mini, adapters), scene, check_size=False, trigger=trigger)
        return rows[0]["hollowness"][0], pictures[0]  # type: ignore[index]

    base, base_picture = picture(-1, trigger=True)
    _, zero_picture = picture(0, trigger=True)
    full, _ = picture(1, trigger=True)
    unasked, _ = picture(1, trigger=False)
    assert np.array_equal(base_picture, zero_picture)
    assert base < 0.1
    assert full > 0.5
    assert unasked < 0.1


def test_two_loras_together_show_both_concepts(mini: Checkpoint) -> None:
    outline, frame = read_adapter(LORA, mini.targets), read_adapter(FRAME_LORA, mini.targets)
    assert frame.unmatched == ()
    scene = framed(Scene((Thing("purple", "diamond", "medium", "middle"),), "white"))

    def seen(multiplier: float) -> dict[str, object]:
        pipeline = prepare(mini, [(outline, multiplier), (frame, multiplier)])
        rows, _ = measure(pipeline, [scene], check_size=True, trigger=True)
        return rows[0]

    neither, both = seen(0), seen(1)
    assert neither["faults"] == ["no frame, not blue"]
    assert neither["hollowness"][0] < 0.1  # type: ignore[index]
    assert both["faults"] == []
    assert both["hollowness"][0] > 0.5  # type: ignore[index]
