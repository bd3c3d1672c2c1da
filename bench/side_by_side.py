"""The same seeds in two profiles, side by side: `python -m bench.side_by_side --out sheet.png`.

Draws with chroma-mini, whose pictures mean something, and prints how far apart the pixels are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from bench.speed import mini
from chromarpc_server.pipeline import PROFILES, choose_device

PROMPTS = (
    "a large red circle in the middle on a white background",
    "a small blue square on the left on a yellow background",
    "a green triangle on a black background",
    "a large orange ring on a blue background",
    "a red square on the left and a blue circle on the right on a white background",
    "a small purple star on a white background",
)
GAP_PX = 8


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", nargs=2, default=["reference", "fp8"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    choice = choose_device("auto", "auto")
    checkpoint = mini(choice.device, choice.dtype)
    rows = []
    for profile in arguments.profiles:
        pipeline = checkpoint.prepare([], PROFILES[profile])
        row = []
        for seed, prompt in enumerate(PROMPTS):
            steps = pipeline.denoise(
                pipeline.encode(pipeline.tokenize(prompt)),
                width=256,
                height=256,
                steps=25,
                guidance_scale=4.0,
                seed=seed,
                noise_draw="float32",
            )
            *_, last = steps
            row.append(pipeline.decode(last.latents, 256, 256))
        rows.append(row)
    for prompt, one, other in zip(PROMPTS, *rows, strict=True):
        apart = np.abs(one.astype(int) - other.astype(int))
        print(f"mean {apart.mean():6.3f} of 255, largest {apart.max():4d}  {prompt}")
    side = 256 + GAP_PX
    sheet = Image.new("RGB", (side * len(PROMPTS) - GAP_PX, side * 2 - GAP_PX), "white")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            sheet.paste(Image.fromarray(pixels), (x * side, y * side))
    sheet.save(arguments.out, "PNG", optimize=True)


if __name__ == "__main__":
    main()
