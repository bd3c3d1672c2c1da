"""Measures chroma-mini and its LoRAs through the pipeline itself: `python -m tools.mini.evaluate --model FOLDER`.

Draws held-out prompts at 256×256, 25 steps, guidance 4, lets the checker look at the pixels, and writes
results.json, a contact sheet and a sheet of the failures.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from chromarpc_server.pipeline import PROFILES, Adapter, Checkpoint, CheckpointFiles, Pipeline, read_adapter
from tools.mini.captions import TRIGGER, full_caption
from tools.mini.checker import faults, look
from tools.mini.parts import TRANSFORMER_FILE
from tools.mini.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    all_single_scenes,
    framed,
    held_out,
)

MULTIPLIERS = (0.0, 0.25, 0.5, 0.75, 1.0)


def load(folder: Path, device: str) -> Checkpoint:
    """The checkpoint, through the product's front door."""
    files = CheckpointFiles(
        transformer=folder / TRANSFORMER_FILE,
        text_encoder=folder / "text_encoder_2",
        tokenizer=folder / "tokenizer_2",
        vae=folder / "vae",
        preview=folder / "latent_preview.json",
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Checkpoint.load(files, device=torch.device(device), dtype=dtype)


def prepare(checkpoint: Checkpoint, adapters: list[tuple[Adapter, float]]) -> Pipeline:
    """A pipeline in the default profile."""
    return checkpoint.prepare(adapters, PROFILES["reference"])


def draw(pipeline: Pipeline, prompt: str, seed: int, size: tuple[int, int] = (256, 256)) -> np.ndarray:
    """One picture (h, w, 3) uint8."""
    width, height = size
    embedding = pipeline.encode(pipeline.tokenize(prompt))
    *_, last = pipeline.denoise(
        embedding, width=width, height=height, steps=25, guidance_scale=4.0, seed=seed, noise_draw="float32"
    )
    return pipeline.decode(last.latents, width, height)


def held_out_singles(count: int) -> list[Scene]:
    """Held-out scenes of one object, the same every time."""
    scenes = [scene for scene in all_single_scenes() if held_out(scene)]
    return random.Random(1).sample(scenes, min(count, len(scenes)))


def held_out_pairs(count: int) -> list[Scene]:
    """Held-out scenes of two objects, the same every time."""
    rng, found = random.Random(2), []
    while len(found) < count:
        relation = rng.choice(list(RELATIONS))
        first, second = (
            Thing(rng.choice(list(COLORS)), rng.choice(SHAPES), "medium", place) for place in RELATIONS[relation]
        )
        scene = Scene((first, second), rng.choice(list(BACKGROUNDS)), relation)
        if held_out(scene) and (first.color, first.shape) != (second.color, second.shape):
            found.append(scene)
    return found


def sheet(pictures: list[np.ndarray], columns: int, side: int = 128) -> Image.Image:
    """Pictures in rows."""
    rows = (len(pictures) + columns - 1) // columns
    image = Image.new("RGB", (columns * side, rows * side), "white")
    for index, picture in enumerate(pictures):
        tile = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
        image.paste(tile, (index % columns * side, index // columns * side))
    return image


def measure(
    pipeline: Pipeline, scenes: list[Scene], *, check_size: bool, trigger: bool = False
) -> tuple[list[dict[str, object]], list[np.ndarray]]:
    """Draws and judges every scene."""
    rows, pictures = [], []
    for index, scene in enumerate(scenes):
        prompt = full_caption(scene)
        if trigger:
            first = f"{scene.things[0].size} {scene.things[0].color}"
            prompt = prompt.replace(first, f"{TRIGGER} {first}")
        picture = draw(pipeline, prompt, seed=1000 + index)
        seen = look(torch.from_numpy(picture).permute(2, 0, 1))
        rows.append(
            {
                "prompt": prompt,
                "seed": 1000 + index,
                "faults": faults(scene, seen, check_size=check_size),
                "hollowness": [round(thing.hollowness, 3) for thing in seen.things],
                "frame": seen.frame,
            }
        )
        pictures.append(picture)
    return rows, pictures


def right(rows: list[dict[str, object]]) -> float:
    """Share of pictures without a fault."""
    return sum(not row["faults"] for row in rows) / len(rows)


def lora_scenes(count: int) -> list[Scene]:
    """Held-out scenes whose one object is large and simple enough for an outline to show."""
    shapes = ("circle", "square", "diamond", "triangle")
    return [
        scene
        for scene in held_out_singles(500)
        if scene.things[0].size != "small" and scene.things[0].shape in shapes
    ][:count]


def hollowness(rows: list[dict[str, object]]) -> float:
    """Of the first object, on average; 0 where there is none."""
    return sum(row["hollowness"][0] if row["hollowness"] else 0.0 for row in rows) / len(rows)  # type: ignore[index]


def summary(rows: list[dict[str, object]]) -> dict[str, float]:
    """Shares of pictures with a frame, with a blue one, with an outline in it; and the mean hollowness."""
    outlined = [bool(row["hollowness"]) and row["hollowness"][0] > 0.5 for row in rows]  # type: ignore[index]
    both = [line and row["frame"] == "blue" for line, row in zip(outlined, rows, strict=True)]
    return {
        "framed": sum(row["frame"] is not None for row in rows) / len(rows),
        "framed_blue": sum(row["frame"] == "blue" for row in rows) / len(rows),
        "hollowness": hollowness(rows),
        "hollow": sum(outlined) / len(rows),
        "hollow_and_framed_blue": sum(both) / len(rows),
        "right": right(rows),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lora", type=Path, help="the one that hollows shapes")
    parser.add_argument("--frame-lora", type=Path, help="the one that draws a frame")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--singles", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--lora-prompts", type=int, default=24)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = load(arguments.model, arguments.device)
    base = prepare(checkpoint, [])
    begun = time.time()
    singles, single_pictures = measure(base, held_out_singles(arguments.singles), check_size=True)
    pairs, pair_pictures = measure(base, held_out_pairs(arguments.pairs), check_size=False)
    results: dict[str, object] = {
        "one_object_right": right(singles),
        "one_object_right_but_size": sum(
            not [f for f in row["faults"] if f.split(",")[0] not in ("small", "medium", "large")]  # type: ignore[attr-defined]
            for row in singles
        ) / len(singles),
        "two_objects_right": right(pairs),
        "seconds_each": (time.time() - begun) / (len(singles) + len(pairs)),
    }  # fmt: skip
    if arguments.lora:
        adapter = read_adapter(arguments.lora, checkpoint.targets)
        scenes = lora_scenes(arguments.lora_prompts)
        growth, tiles = {}, []
        for multiplier in MULTIPLIERS:
            rows, pictures = measure(
                prepare(checkpoint, [(adapter, multiplier)]), scenes, check_size=False, trigger=True
            )
            growth[str(multiplier)] = hollowness(rows)
            tiles.append(pictures[:8])
        results["hollowness_by_multiplier"] = growth
        sheet([tile for row in tiles for tile in row], 8).save(arguments.out / "lora.png")
    if arguments.frame_lora:
        frame = read_adapter(arguments.frame_lora, checkpoint.targets)
        scenes = [framed(scene) for scene in lora_scenes(arguments.lora_prompts)]
        by_multiplier, tiles = {}, []
        for multiplier in MULTIPLIERS:
            rows, pictures = measure(prepare(checkpoint, [(frame, multiplier)]), scenes, check_size=False)
            by_multiplier[str(multiplier)] = summary(rows)
            tiles.append(pictures[:8])
        results["frame_by_multiplier"] = by_multiplier
        sheet([tile for row in tiles for tile in row], 8).save(arguments.out / "frame.png")
    if arguments.lora and arguments.frame_lora:
        together, tiles = {}, []
        for multiplier in (0.0, 0.75, 1.0):
            pipeline = prepare(checkpoint, [(adapter, 1.0), (frame, multiplier)])
            rows, pictures = measure(pipeline, scenes, check_size=False, trigger=True)
            together[str(multiplier)] = summary(rows)
            tiles.append(pictures[:8])
        results["hollow_at_1_with_frame_at"] = together
        sheet([tile for row in tiles for tile in row], 8).save(arguments.out / "both.png")
    print(json.dumps(results, indent=1))
    failures = [(row, picture) for row, picture in zip(singles, single_pictures, strict=True) if row["faults"]]
    for row, _ in failures[:30]:
        print(row["prompt"], row["faults"])
    (arguments.out / "results.json").write_text(
        json.dumps({**results, "one_object": singles, "two_objects": pairs}, indent=1) + "\n", encoding="utf-8"
    )
    sheet(single_pictures[:48] + pair_pictures[:16], 8).save(arguments.out / "contact_sheet.png")
    if failures:
        sheet([picture for _, picture in failures[:32]], 8).save(arguments.out / "failures.png")


if __name__ == "__main__":
    main()
