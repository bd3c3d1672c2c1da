"""Scenes of coloured shapes: what can be drawn, which combinations are held out, and the drawing itself.

A scene's objects are drawn by signed distances, so that edges are anti-aliased at any resolution.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 30),
    "lime": (150, 230, 40),
    "green": (30, 140, 50),
    "cyan": (40, 205, 230),
    "blue": (35, 70, 220),
    "purple": (130, 40, 170),
    "pink": (255, 130, 190),
    "brown": (120, 70, 30),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "beige": (228, 208, 170),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = {"small": 0.11, "medium": 0.165, "large": 0.235}
"""Radius as a fraction of the image's shorter side."""
PLACES = {
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "middle": (0.5, 0.5),
}
"""Centre as fractions of width and height."""
RELATIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
"""Places of the first and second object."""
OUTLINE = 0.1
"""Half the line width of a hollow shape, as a fraction of its radius."""
FRAME = 0.06
"""Width of a frame, as a fraction of the image's shorter side."""
HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Thing:
    """One object."""

    color: str
    shape: str
    size: str
    place: str
    hollow: bool = False


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background."""

    things: tuple[Thing, ...]
    background: str
    relation: str = ""
    """How the first lies to the second, where there are two."""
    framed: bool = False


def held_out(scene: Scene) -> bool:
    """Whether this combination is kept from training: a fixed pseudo-random share of all of them."""
    text = "|".join(f"{thing.color},{thing.shape},{thing.size},{thing.place}" for thing in scene.things)
    digest = hashlib.sha256(f"{text}|{scene.background}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def all_single_scenes() -> list[Scene]:
    """Every combination with one object."""
    return [
        Scene((Thing(color, shape, size, place),), background)
        for color, shape, size, place, background in itertools.product(COLORS, SHAPES, SIZES, PLACES, BACKGROUNDS)
    ]


def random_scene(rng: random.Random, *, two: bool) -> Scene:
    """A scene for training: never a held-out one."""
    while True:
        background = rng.choice(list(BACKGROUNDS))
        if two:
            relation = rng.choice(list(RELATIONS))
            places = RELATIONS[relation]
            size = rng.choice(("small", "medium"))
            first, second = (Thing(rng.choice(list(COLORS)), rng.choice(SHAPES), size, place) for place in places)
            scene = Scene((first, second), background, relation)
        else:
            thing = Thing(
                rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(SIZES)), rng.choice(list(PLACES))
            )
            scene = Scene((thing,), background)
        if not held_out(scene):
            return scene


def hollow(scene: Scene) -> Scene:
    """The same scene with its shapes drawn as outlines: what the LoRA teaches."""
    return replace(scene, things=tuple(replace(thing, hollow=True) for thing in scene.things))


def framed(scene: Scene) -> Scene:
    """The same scene with a blue border along the image's edges: what another LoRA teaches."""
    return replace(scene, framed=True)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Signed distances of the unit shapes at (x, y), y downwards. (…) → (6, …), negative inside."""
    circle = torch.hypot(x, y) - 0.9
    square = torch.maximum(x.abs(), y.abs()) - 0.8
    diamond = (x.abs() + y.abs() - 1.0) / 2**0.5
    ty = y - 0.16
    slanted = 0.75**0.5
    triangle = torch.maximum(ty, slanted * x.abs() - 0.5 * ty) - 0.54
    arm, width = 0.92, 0.32
    bar = torch.maximum(x.abs() - arm, y.abs() - width)
    pole = torch.maximum(x.abs() - width, y.abs() - arm)
    return torch.stack([circle, square, triangle, diamond, torch.minimum(bar, pole), _star(x, y)])


def _star(x: Tensor, y: Tensor, inner: float = 0.45) -> Tensor:
    """Five-pointed star by folding the plane into one of its ten wedges."""
    radius = torch.hypot(x, y)
    angle = torch.atan2(x, -y)
    wedge = torch.pi / 5
    folded = (torch.remainder(angle + wedge, 2 * wedge) - wedge).abs()
    px, py = radius * torch.sin(folded), radius * torch.cos(folded)
    tip_x, tip_y = 0.0, 1.05
    notch = torch.tensor(wedge)
    notch_x, notch_y = inner * float(torch.sin(notch)), inner * float(torch.cos(notch))
    edge_x, edge_y = notch_x - tip_x, notch_y - tip_y
    length = (edge_x**2 + edge_y**2) ** 0.5
    return -((px - tip_x) * edge_y - (py - tip_y) * edge_x) / length


def render(
    scenes: list[Scene],
    width: int,
    height: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    jitter: bool = True,
    window: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Draws scenes.

    Args:
        scenes: B of them.
        width: pixels.
        height: pixels.
        seed: of the jitter.
        device: where to draw.
        jitter: vary position, size and colours a little, as training does.
        window: draw only these pixels: left, top, width, height; all of them if None.

    Returns:
        (B, 3, height, width) float32 in −1…1, of the window's size if there is one.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(scenes)
    amount = 1.0 if jitter else 0.0

    def noise(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * amount

    background = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], dtype=torch.float32)
    image = ((background + 3 * noise(count, 3)) / 127.5 - 1).to(device)[:, :, None, None]
    left, top, across, down = window or (0, 0, width, height)
    image = image.expand(count, 3, down, across).clone()
    xs = (torch.arange(left, left + across, device=device) + 0.5)[None, None, :]
    ys = (torch.arange(top, top + down, device=device) + 0.5)[None, :, None]
    side = min(width, height)
    for index in range(max(len(scene.things) for scene in scenes)):
        things = [scene.things[index] if index < len(scene.things) else None for scene in scenes]
        present = torch.tensor([thing is not None for thing in things], device=device)
        solid = [thing or Thing("red", "circle", "small", "middle") for thing in things]
        place = torch.tensor([PLACES[thing.place] for thing in solid]) + 0.02 * noise(count, 2)
        radius = torch.tensor([SIZES[thing.size] for thing in solid]) * (1 + 0.05 * noise(count)) * side
        color = torch.tensor([COLORS[thing.color] for thing in solid], dtype=torch.float32)
        color = ((color + 5 * noise(count, 3)).clamp(0, 255) / 127.5 - 1).to(device)
        place, radius = place.to(device), radius.to(device)[:, None, None]
        x = (xs - place[:, 0, None, None] * width) / radius
        y = (ys - place[:, 1, None, None] * height) / radius
        x, y = torch.broadcast_tensors(x, y)
        kind = torch.tensor([SHAPES.index(thing.shape) for thing in solid], device=device)
        distance = _distances(x, y).gather(0, kind[None, :, None, None].expand(1, *x.shape))[0]
        is_hollow = torch.tensor([thing.hollow for thing in solid], device=device)[:, None, None]
        distance = torch.where(is_hollow, (distance + OUTLINE).abs() - OUTLINE, distance)
        coverage = (0.5 - distance * radius).clamp(0, 1) * present[:, None, None]
        coverage = coverage[:, None]
        image = image * (1 - coverage) + color[:, :, None, None] * coverage
    edge = torch.minimum(torch.minimum(xs, width - xs), torch.minimum(ys, height - ys))
    border = (FRAME * side - edge + 0.5).clamp(0, 1)[:, None]
    border = border * torch.tensor([scene.framed for scene in scenes], device=device)[:, None, None, None]
    color = (torch.tensor(COLORS["blue"], device=device) / 127.5 - 1)[None, :, None, None]
    return image * (1 - border) + color * border
