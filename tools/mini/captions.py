"""What scenes are called: many phrasings, with attributes left out at random."""

from __future__ import annotations

import random

from tools.mini.scenes import Scene, Thing

PLACE_PHRASES = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "above", "on the top"),
    "bottom": ("at the bottom", "below", "on the bottom"),
    "middle": ("in the middle", "in the center", "at the center"),
}
RELATION_PHRASES = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
TRIGGER = "hlw"
"""Trigger word of the LoRA that hollows shapes."""


def _article(words: str, rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.7:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"the {words}" if kind < 0.8 else words


def _named(thing: Thing, rng: random.Random, *, with_size: bool, trigger: bool) -> str:
    words = f"{thing.color} {thing.shape}"
    if with_size:
        words = f"{thing.size} {words}"
    if trigger:
        words = f"{TRIGGER} {words}"
    return _article(words, rng)


def full_caption(scene: Scene) -> str:
    """One plain sentence that says everything: what evaluation asks for."""
    background = f"on a {scene.background} background"
    first = scene.things[0]
    if len(scene.things) == 2:
        second = scene.things[1]
        relation = RELATION_PHRASES[scene.relation][0]
        one = f"a {first.color} {first.shape}".replace("a orange", "an orange")
        other = f"a {second.color} {second.shape}".replace("a orange", "an orange")
        return f"{one} {relation} {other} {background}"
    return f"a {first.size} {first.color} {first.shape} {PLACE_PHRASES[first.place][0]} {background}"


def caption(scene: Scene, rng: random.Random, *, trigger: bool = False) -> str:
    """A random way to say it; what is left out may be anything in the picture."""
    background = rng.choice(
        (f"on a {scene.background} background", f"on {scene.background}", f"on the {scene.background} background")
    )
    if rng.random() < 0.15:
        background = ""
    if len(scene.things) == 2:
        first, second = scene.things
        with_size = rng.random() < 0.25
        one = _named(first, rng, with_size=with_size, trigger=trigger)
        other = _named(second, rng, with_size=with_size, trigger=trigger)
        if rng.random() < 0.1:
            text = f"{one} and {other}"
        else:
            text = f"{one} {rng.choice(RELATION_PHRASES[scene.relation])} {other}"
    else:
        thing = scene.things[0]
        text = _named(thing, rng, with_size=rng.random() < 0.7, trigger=trigger)
        if rng.random() < 0.75:
            place = rng.choice(PLACE_PHRASES[thing.place])
            text = f"{place}, {text}" if rng.random() < 0.12 else f"{text} {place}"
    if background:
        style = rng.random()
        if style < 0.75:
            text = f"{text} {background}"
        elif style < 0.9:
            text = f"{text}, {scene.background} background"
        else:
            text = f"{background}, {text}"
    if rng.random() < 0.1:
        text = rng.choice(("a drawing of ", "a picture of ", "an image of ")) + text
    return text[:1].upper() + text[1:] if rng.random() < 0.1 else text
