"""How alike two pictures are, by Pillow alone and fast: a report measures hundreds."""

from __future__ import annotations

import io
import math
from array import array
from dataclasses import dataclass
from typing import Any, Final, cast

from PIL import Image, ImageChops, ImageMath

SAME_DB: Final = 100.0
"""PSNR of equal pixels, which have none."""
WINDOW_PX: Final = 8
STRIDE_PX: Final = 4
MAX_PIXELS: Final = 4096 * 4096
FORMATS: Final = ("JPEG", "PNG", "WEBP")
_C1: Final = (0.01 * 255) ** 2
_C2: Final = (0.03 * 255) ** 2


class NoPicture(Exception):
    """Bytes that are no picture that a trainer writes; a sentence for people."""


@dataclass(frozen=True)
class Similarity:
    """How alike two pictures of one size are."""

    identical: bool
    """Every byte of the files."""
    same_pixels: bool
    psnr_db: float
    """Over red, green and blue; `SAME_DB` where the pixels are equal."""
    ssim: float
    largest_difference: int
    """Of one channel of one pixel, 0 to 255."""


def decode(data: bytes) -> Image.Image:
    """The picture of a file, as RGB.

    Raises:
        NoPicture: it is none, is broken, or has more than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            size = picture.size
            if size[0] * size[1] <= MAX_PIXELS:
                return picture.convert("RGB")
    except Exception as error:  # decoders raise whatever they like
        raise NoPicture("is no picture, or a broken one") from error
    raise NoPicture(f"has {size[0]}×{size[1]} pixels")


def compare(ours: bytes, theirs: bytes) -> Similarity:
    """Measures two picture files.

    Raises:
        NoPicture: one of them cannot be decoded.
        ValueError: they have different sizes.
    """
    first, second = decode(ours), decode(theirs)
    if first.size != second.size:
        raise ValueError(f"{first.width}×{first.height} beside {second.width}×{second.height}")
    squares, largest = _squared_error(first, second)
    return Similarity(
        identical=ours == theirs,
        same_pixels=largest == 0,
        psnr_db=psnr_db(squares, first.width * first.height * 3),
        ssim=ssim(first, second),
        largest_difference=largest,
    )


def psnr_db(squares: int, count: int) -> float:
    """Peak signal to noise ratio of a sum of squared differences of `count` values 0 to 255, in decibels."""
    return SAME_DB if not squares else min(SAME_DB, 10 * math.log10(255**2 * count / squares))


def ssim(first: Image.Image, second: Image.Image) -> float:
    """Structural similarity of the brightness, -1 to 1, over windows of 8×8 pixels every 4 pixels.

    Wang, Bovik, Sheikh, Simoncelli 2004, with ffmpeg's windows. A picture smaller than a window is one window.
    """
    a, b = first.convert("L").convert("F"), second.convert("L").convert("F")
    square_a, square_b, product = (_product(x, y) for x, y in ((a, a), (b, b), (a, b)))
    total, count = 0.0, 0
    for top in (0, STRIDE_PX):
        for left in (0, STRIDE_PX):
            box = (left, top, *_whole_windows(a.size, left, top))
            if box[0] >= box[2] or box[1] >= box[3]:
                continue
            means = [image.crop(box).reduce(_window(a.size)) for image in (a, b, square_a, square_b, product)]
            values = _similarities(*means)
            total += math.fsum(values)
            count += len(values)
    return total / count


def _similarities(
    mean_a: Image.Image, mean_b: Image.Image, square_a: Image.Image, square_b: Image.Image, product: Image.Image
) -> array[float]:
    """Of each window, from its means: of the values, their squares and their products."""

    def similarity(args: Any) -> Any:
        a, b = args["a"], args["b"]
        variances = args["s"] - a * a + (args["t"] - b * b)
        covariance = args["p"] - a * b
        return (2 * a * b + _C1) * (2 * covariance + _C2) / ((a * a + b * b + _C1) * (variances + _C2))

    result: Any = ImageMath.lambda_eval(similarity, a=mean_a, b=mean_b, s=square_a, t=square_b, p=product)
    values = array("f")
    values.frombytes(result.tobytes())
    return values


def _squared_error(first: Image.Image, second: Image.Image) -> tuple[int, int]:
    """Sum of the squared differences of all channels, and the largest difference."""
    histogram = ImageChops.difference(first, second).histogram()
    counts = [sum(histogram[value::256]) for value in range(256)]
    return sum(count * value * value for value, count in enumerate(counts)), max(
        value for value, count in enumerate(counts) if count
    )


def _window(size: tuple[int, int]) -> tuple[int, int]:
    return min(WINDOW_PX, size[0]), min(WINDOW_PX, size[1])


def _whole_windows(size: tuple[int, int], left: int, top: int) -> tuple[int, int]:
    across, down = _window(size)
    return left + (size[0] - left) // across * across, top + (size[1] - top) // down * down


def _product(first: Image.Image, second: Image.Image) -> Image.Image:
    product: Any = ImageMath.lambda_eval(lambda args: args["x"] * args["y"], x=first, y=second)
    return cast("Image.Image", product)
