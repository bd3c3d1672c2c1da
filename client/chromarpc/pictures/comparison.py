"""What differs between two pictures: field by field, and pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageChops

from chromarpc.pictures.facts import Fact, PictureFacts, in_order
from chromarpc.replay.similarity import NoPicture as Undecodable
from chromarpc.replay.similarity import Similarity, decode
from chromarpc.replay.similarity import compare as measure

AMPLIFIED: Final = 8
NOT_THERE: Final = "none"


@dataclass(frozen=True)
class Difference:
    """One field of two pictures."""

    name: str
    first: str
    second: str
    """As people read them."""
    differs: bool
    """Whether both are known and not the same."""
    is_known: bool
    """Whether both are known."""
    note: str = ""

    @property
    def line(self) -> str:
        """`NAME: A → B`, or one value where they are the same."""
        values = self.first if self.first == self.second and not self.differs else f"{self.first} → {self.second}"
        return f"{self.name}: {values}{f'  ({self.note})' if self.note else ''}"


def compare_facts(first: PictureFacts, second: PictureFacts) -> list[Difference]:
    """All fields that one of them has, the most telling first."""
    names = in_order({*first.names(), *second.names()})
    found = []
    for name in names:
        if _is_folded(name, first, second) or _is_implied(name, first, second):
            continue
        found.append(_compare(name, first.get(name), second.get(name), _versions(name, first, second)))
    return found


def _compare(name: str, one: Fact | None, other: Fact | None, versions: tuple[str, str] | None) -> Difference:
    if versions is not None:
        return Difference(name, *versions, differs=False, is_known=False)
    values = (NOT_THERE if one is None else one.shown, NOT_THERE if other is None else other.shown)
    compared = [None if fact is None else fact.compared for fact in (one, other)]
    is_known = not any(fact is not None and fact.value is None for fact in (one, other))
    differs = is_known and ((one is None) != (other is None) or compared[0] != compared[1])
    notes = [fact.note for fact in (one, other) if fact is not None and fact.note]
    return Difference(name, *values, differs=differs, is_known=is_known, note="; ".join(dict.fromkeys(notes)))


def _is_folded(name: str, first: PictureFacts, second: PictureFacts) -> bool:
    """Versions one by one are told only where both tell them so."""
    parts = [facts for facts in (first, second) if any(known.startswith("versions.") for known in facts.facts)]
    if name == "versions":
        return len(parts) == 2
    return name.startswith("versions.") and len(parts) == 1


def _versions(name: str, first: PictureFacts, second: PictureFacts) -> tuple[str, str] | None:
    """Both sides of the one line about versions, where one of them tells of each by itself."""
    if name != "versions":
        return None
    one, other = (
        ", ".join(
            f"{known.removeprefix('versions.')} {fact.shown}"
            for known, fact in facts.facts.items()
            if known.startswith("versions.")
        )
        or (facts.get("versions") or Fact(None)).shown
        for facts in (first, second)
    )
    return one, other


def _is_implied(name: str, first: PictureFacts, second: PictureFacts) -> bool:
    """Of an adapter or a trainer's option that only one of them has, one line is enough."""
    if not name.startswith("loras.") or name.endswith(".path"):
        return False
    path = f"{name.rsplit('.', 1)[0]}.path"
    return (path in first.facts) != (path in second.facts)


@dataclass(frozen=True)
class PixelComparison:
    """How far two pictures are apart, or why that cannot be said."""

    similarity: Similarity | None
    reason: str = ""
    sizes_differ: bool = False

    @property
    def line(self) -> str:
        """For people."""
        found = self.similarity
        if found is None:
            return f"pixels: {self.reason}"
        if found.same_pixels:
            return f"pixels: the same{', and so is every byte' if found.identical else ''}"
        return (
            f"pixels: PSNR {found.psnr_db:.2f} dB, SSIM {found.ssim:.4f}, largest difference "
            f"{found.largest_difference} of 255"
        )


def compare_pixels(first: bytes, second: bytes) -> PixelComparison:
    """Decodes and measures both, within limits."""
    try:
        return PixelComparison(measure(first, second))
    except Undecodable as error:
        return PixelComparison(None, f"cannot be compared: one of them {error}")
    except ValueError as error:
        return PixelComparison(None, f"{error}, so they are not compared", sizes_differ=True)


def difference_picture(first: bytes, second: bytes) -> Image.Image:
    """The absolute difference of each channel, amplified so that people see it; black is equal.

    Raises:
        Undecodable: one of them is no picture, or too large.
        ValueError: their sizes differ.
    """
    one, other = decode(first), decode(second)
    if one.size != other.size:
        raise ValueError(f"{one.width}×{one.height} beside {other.width}×{other.height}")
    return ImageChops.difference(one, other).point(lambda value: min(255, value * AMPLIFIED))
