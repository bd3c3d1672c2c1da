"""How alike two pictures are, against the definitions written out."""

from __future__ import annotations

import io
import math
import random
import time

import pytest
from PIL import Image

from chromarpc.replay.calibration import Trial, judge
from chromarpc.replay.similarity import MAX_PIXELS, NoPicture, compare, decode, ssim
from tests.client.replay_fake_server import picture, trainer_jpeg


def noise(width: int, height: int, seed: int) -> Image.Image:
    drawn = random.Random(seed)
    return Image.frombytes("RGB", (width, height), bytes(drawn.choices(range(256), k=width * height * 3)))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def plain_psnr(first: Image.Image, second: Image.Image) -> float:
    pairs = list(zip(first.tobytes(), second.tobytes(), strict=True))
    return 10 * math.log10(255**2 / (sum((a - b) ** 2 for a, b in pairs) / len(pairs)))


def plain_ssim(first: Image.Image, second: Image.Image) -> float:
    a, b = first.convert("L"), second.convert("L")
    values = []
    for top in range(0, a.height - 7, 4):
        for left in range(0, a.width - 7, 4):
            x, y = (list(one.crop((left, top, left + 8, top + 8)).tobytes()) for one in (a, b))
            mx, my = sum(x) / 64, sum(y) / 64
            vx, vy = (sum((v - m) ** 2 for v in w) / 64 for w, m in ((x, mx), (y, my)))
            cov = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True)) / 64
            c1, c2 = 6.5025, 58.5225
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return sum(values) / len(values)


@pytest.mark.parametrize("size", [(64, 64), (80, 48), (61, 37), (8, 8)])
def test_the_measures_are_their_definitions(size: tuple[int, int]) -> None:
    first = noise(*size, seed=1)
    second = Image.blend(first, noise(*size, seed=2), 0.2)
    found = compare(png(first), png(second))
    assert found.psnr_db == pytest.approx(plain_psnr(first, second), abs=1e-9)
    assert found.ssim == pytest.approx(plain_ssim(first, second), abs=1e-4)
    assert not found.same_pixels
    assert found.largest_difference == max(
        abs(a - b) for a, b in zip(first.tobytes(), second.tobytes(), strict=True)
    )


def test_equal_bytes_are_identical_and_equal_pixels_are_not() -> None:
    first = picture(prompt="a")
    same = compare(trainer_jpeg(first), trainer_jpeg(first))
    assert (same.identical, same.same_pixels, same.psnr_db, same.ssim) == (True, True, 100.0, 1.0)
    decoded = decode(trainer_jpeg(first))
    pixels = compare(png(decoded), trainer_jpeg(first))
    assert (pixels.identical, pixels.same_pixels, pixels.psnr_db, pixels.ssim) == (False, True, 100.0, 1.0)


def test_a_picture_smaller_than_a_window_is_one_window() -> None:
    first = noise(5, 3, seed=1)
    assert ssim(first, first) == 1.0
    assert ssim(first, noise(5, 3, seed=2)) < 1.0


@pytest.mark.parametrize("data", [b"", b"GIF89a", trainer_jpeg(picture(prompt="a"))[:300], b"\x89PNG\r\n\x1a\n"])
def test_broken_pictures_end_in_a_sentence(data: bytes) -> None:
    with pytest.raises(NoPicture, match="no picture, or a broken one"):
        decode(data)


def test_a_picture_of_too_many_pixels_is_not_decoded() -> None:
    side = math.isqrt(MAX_PIXELS) + 16
    with pytest.raises(NoPicture, match="pixels"):
        decode(png(Image.new("1", (side, side))))


def test_sizes_must_be_equal() -> None:
    with pytest.raises(ValueError, match="64×64 beside 80×64"):
        compare(png(noise(64, 64, 1)), png(noise(80, 64, 1)))


def test_a_megapixel_is_measured_at_once() -> None:
    first = trainer_jpeg(Image.effect_noise((1024, 1024), 60).convert("RGB"))
    second = trainer_jpeg(Image.effect_noise((1024, 1024), 60).convert("RGB"))
    started = time.process_time()
    compare(first, second)
    assert time.process_time() - started < 2.0


@pytest.mark.parametrize(
    ("float32", "legacy", "draw", "matches"),
    [
        (58.0, 12.0, "float32", True),
        (12.0, 100.0, "legacy", True),
        (24.0, 12.0, "float32", True),  # rough, and still plainly the one
        (24.0, 20.0, "float32", False),
        (14.0, 12.0, "float32", False),
    ],
)
def test_the_draw_that_matches_is_kept(float32: float, legacy: float, draw: str, matches: bool) -> None:
    trial = Trial(step=0, index=0, psnr_db={"float32": float32, "legacy": legacy})
    found = judge([trial], likely="float32", with_adapter=False)
    assert (found.noise_draw, found.matches) == (draw, matches)
    assert ("the base model or the settings differ, not the LoRA" in found.sentence) is not matches


def test_a_sample_that_looks_alike_in_both_draws_does_not_decide() -> None:
    plain = Trial(step=0, index=0, psnr_db={"float32": 33.0, "legacy": 33.4})
    telling = Trial(step=0, index=1, psnr_db={"float32": 48.0, "legacy": 20.0})
    assert (plain.matches, plain.decides, telling.decides) == (True, False, True)
    found = judge([plain, telling], likely="legacy", with_adapter=False)
    assert (found.noise_draw, found.matches) == ("float32", True)
    assert "sample 1 of step 0" in found.sentence


def test_without_a_trial_the_date_decides() -> None:
    found = judge([Trial(step=0, index=0, psnr_db={})], likely="legacy", with_adapter=False)
    assert (found.noise_draw, found.matches) == ("legacy", None)
