"""Judges a picture by its pixels alone: background, frame, and each object's colour, shape, size and place.

Written against drawn scenes, never against a model's output, but for MIN_TRACE (models break frames).
Objects are what differs from the background;
their shape is the template that overlaps best once both are scaled to the same box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.mini.scenes import BACKGROUNDS, COLORS, FRAME, PLACES, SHAPES, SIZES, Scene, Thing, render

CONTRAST = 55.0
"""Euclidean RGB distance from the background beyond which a pixel belongs to an object."""
MIN_IOU = 0.75
"""A shape that overlaps its best template less than this is none."""
MIN_AREA = 0.004
"""Objects smaller than this share of the image are specks."""
MIN_FRAME = 0.75
"""A frame covers at least this share of the band along each of the four edges."""
MIN_TRACE = 0.5
"""An edge covered as much as this has a piece of a frame: objects, none of which covers so much, lie within."""
_BOX = 64


@dataclass(frozen=True)
class Found:
    """One object, as seen."""

    color: str
    shape: str
    iou: float
    size: str
    place: str
    hollowness: float
    """Share of the pixels well inside the outline that are not the object's: 0 for a solid shape."""


@dataclass(frozen=True)
class Seen:
    """A picture, as seen: objects from left to right, then top to bottom."""

    background: str
    things: tuple[Found, ...]
    frame: str | None
    """Colour of the frame along the edges; None where there is no frame."""


def _nearest(color: Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float((color - torch.tensor(palette[name]).float()).norm()))


def _labels(mask: Tensor) -> Tensor:
    """Labels of the 4-connected components of a (h, w) bool mask, from 1; 0 outside. Joins runs of rows."""
    parents: list[int] = [0]

    def root(label: int) -> int:
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    edges = torch.diff(F.pad(mask.to(torch.int8), (1, 1)), dim=1)
    above: list[tuple[int, int, int]] = []
    runs: list[list[tuple[int, int, int]]] = []
    for row in edges:
        starts = (row == 1).nonzero()[:, 0].tolist()
        ends = (row == -1).nonzero()[:, 0].tolist()
        current = []
        for start, end in zip(starts, ends, strict=True):
            label = len(parents)
            parents.append(label)
            for other_start, other_end, other in above:
                if other_start < end and start < other_end:
                    parents[root(label)] = root(other)
            current.append((start, end, label))
        runs.append(current)
        above = current
    labels = torch.zeros(mask.shape, dtype=torch.int64)
    for y, current in enumerate(runs):
        for start, end, label in current:
            labels[y, start:end] = root(label)
    return labels


def _components(mask: Tensor) -> list[Tensor]:
    """Connected components of a (h, w) bool mask, largest first, specks left out."""
    labels = _labels(mask)
    values, counts = labels[labels > 0].unique(return_counts=True)
    order = counts.argsort(descending=True)
    kept = [values[i] for i in order if counts[i] >= MIN_AREA * mask.numel()]
    return [labels == value for value in kept]


def _filled(mask: Tensor, wall: Tensor) -> Tensor:
    """The mask with its holes filled: everything that the outside cannot reach. A wall closes the holes that it
    cuts open; inside one, the outside is the largest region."""
    walled = bool(wall.any())
    labels = _labels(F.pad(~(mask | wall), (1, 1, 1, 1), value=not walled))
    outside = labels[labels > 0].mode().values if walled else labels[0, 0]
    return (labels[1:-1, 1:-1] != outside) & ~wall


def _boxed(mask: Tensor) -> tuple[Tensor, float, float, float]:
    """The mask scaled to a square box; and centre x, centre y, longer side, in pixels."""
    ys, xs = mask.nonzero(as_tuple=True)
    top, bottom, left, right = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
    box = F.interpolate(mask[None, None, top:bottom, left:right].float(), size=(_BOX, _BOX), mode="bilinear")
    return box[0, 0] > 0.5, (left + right) / 2, (top + bottom) / 2, float(max(bottom - top, right - left))


def _templates() -> dict[str, tuple[Tensor, float]]:
    """Each shape's box, and its longer side in units of its radius."""
    templates = {}
    for shape in SHAPES:
        scene = Scene((Thing("red", shape, "large", "middle"),), "white")
        image = render([scene], 256, 256, seed=0, jitter=False)[0]
        mask = (image - image[:, :1, :1]).abs().sum(dim=0) > 0.5
        box, _, _, side = _boxed(mask)
        templates[shape] = (box, side / (SIZES["large"] * 256))
    return templates


_TEMPLATES = _templates()


def _look_at(pixels: Tensor, mask: Tensor, wall: Tensor) -> Found:
    height, width = mask.shape
    filled = _filled(mask, wall)
    box, x, y, side = _boxed(filled)
    overlaps = {
        shape: float((box & template).sum() / (box | template).sum())
        for shape, (template, _) in _TEMPLATES.items()
    }
    shape = max(overlaps, key=lambda name: overlaps[name])
    inner = -F.max_pool2d(-mask[None, None].float(), 3, 1, 1)[0, 0] > 0.5
    sample = pixels[:, inner if inner.any() else mask]
    depth = max(1, round(side * 0.22))
    deep = -F.max_pool2d(-filled[None, None].float(), 2 * depth + 1, 1, depth)[0, 0] > 0.5
    hollowness = float((deep & ~mask).sum() / deep.sum()) if deep.any() else 0.0
    radius = side / _TEMPLATES[shape][1] / min(width, height)
    return Found(
        color=_nearest(sample.median(dim=1).values, COLORS),
        shape=shape if overlaps[shape] >= MIN_IOU else f"no shape (most like a {shape})",
        iou=overlaps[shape],
        size=min(SIZES, key=lambda name: abs(math.log(SIZES[name] / radius))),
        place=min(PLACES, key=lambda name: math.dist(PLACES[name], (x / width, y / height))),
        hollowness=hollowness,
    )


def _edges(pixels: Tensor, depth: int) -> list[Tensor]:
    """The bands along the top, bottom, left and right, each (3, n)."""
    return [band.flatten(1) for band in (pixels[:, :depth], pixels[:, -depth:], pixels[:, :, :depth],
                                         pixels[:, :, -depth:])]  # fmt: skip


def _ground(pixels: Tensor) -> Tensor:
    """The background's colour: the median of the outermost pixels."""
    return torch.cat(_edges(pixels, 4), dim=1).median(dim=1).values


def _inset(pixels: Tensor) -> int:
    """How many pixels to leave out on each side so that nothing of a frame is left, blurred as it may be."""
    return round(1.3 * FRAME * min(pixels.shape[1:]))


def _coverage(pixels: Tensor) -> list[float]:
    """Share of the outer half of a frame's band, edge by edge, that stands out from the background within."""
    inset = _inset(pixels)
    ground = _ground(pixels[:, inset:-inset, inset:-inset])
    depth = max(1, round(FRAME / 2 * min(pixels.shape[1:])))
    bands = _edges(pixels, depth)
    return [float(((band - ground[:, None]).norm(dim=0) > CONTRAST).float().mean()) for band in bands]


def frame_share(pixels: Tensor) -> float:
    """How much of a frame there is, whatever its colour: its share of the edge that has least of it.
    `pixels`: (3, h, w), 0 to 255."""
    return min(_coverage(pixels.float()))


def look(pixels: Tensor) -> Seen:
    """What a picture shows. `pixels`: (3, h, w), 0 to 255."""
    pixels = pixels.float()
    wall = torch.zeros(pixels.shape[1:], dtype=torch.bool)
    background, frame, coverage = _ground(pixels), None, _coverage(pixels)
    if min(coverage) >= MIN_FRAME:
        frame = _nearest(background, {**COLORS, **BACKGROUNDS})
    if max(coverage) >= MIN_TRACE:
        inset = _inset(pixels)
        background = _ground(pixels[:, inset:-inset, inset:-inset])
        wall[:] = True
        wall[inset:-inset, inset:-inset] = False
    mask = ((pixels - background[:, None, None]).norm(dim=0) > CONTRAST) & ~wall
    things = [_look_at(pixels, component, wall) for component in _components(mask)[:4]]
    order = {name: index for index, name in enumerate(("left", "top", "middle", "bottom", "right"))}
    return Seen(_nearest(background, BACKGROUNDS), tuple(sorted(things, key=lambda t: order[t.place])), frame)


def faults(scene: Scene, seen: Seen, *, check_size: bool = True) -> list[str]:
    """What is wrong with a picture of `scene`; empty where everything it says is there and nothing else."""
    problems = []
    if seen.background != scene.background:
        problems.append(f"background {seen.background}, not {scene.background}")
    wanted = "blue" if scene.framed else None
    if seen.frame != wanted:
        problems.append(f"{seen.frame or 'no'} frame, not {wanted or 'none'}")
    if len(seen.things) != len(scene.things):
        return [*problems, f"{len(seen.things)} objects, not {len(scene.things)}"]
    by_place = {found.place: found for found in seen.things}
    for thing in scene.things:
        found = by_place.get(thing.place)
        if found is None:
            problems.append(f"nothing at the {thing.place}")
            continue
        if found.color != thing.color:
            problems.append(f"{found.color}, not {thing.color}")
        if found.shape != thing.shape:
            problems.append(f"{found.shape}, not a {thing.shape}")
        if check_size and found.size != thing.size:
            problems.append(f"{found.size}, not {thing.size}")
    return problems
