"""What stays where: the fastest arrangement that fits, within what the operator decided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chromarpc_server.domain.errors import OutOfMemory
from chromarpc_server.domain.limits import MemoryChoice
from chromarpc_server.pipeline.memory import PartSizes, estimate_bytes, estimate_second_bytes, plan_memory

CHROMA = PartSizes(
    master=17_800_000_000,
    dequantized=17_800_000_000,
    float8=9_200_000_000,
    text_encoder=4_900_000_000,
    autoencoder=170_000_000,
    beside=450_000_000,
)
GB = 10**9


@pytest.mark.parametrize(
    ("gigabytes", "weights", "text_encoder", "master", "tiles"),
    [
        (80, "dequantized", "device", "device", False),
        (40, "dequantized", "device", "host", False),
        (24, "float8", "device", "host", False),
        (16, "float8", "host", "host", False),
        (12, "float8", "host", "host", True),
    ],
)
def test_cards_of_every_size(gigabytes: int, weights: str, text_encoder: str, master: str, tiles: bool) -> None:
    plan = plan_memory(gigabytes * GB, CHROMA, MemoryChoice())
    assert (plan.weights, plan.text_encoder, plan.master, plan.tile_autoencoder) == (
        weights,
        text_encoder,
        master,
        tiles,
    )
    assert plan.estimated_bytes == estimate_bytes(plan, CHROMA) <= gigabytes * GB == plan.usable_bytes


@pytest.mark.parametrize(
    ("gigabytes", "text_encoder", "trainers"),
    [(80, "device", "device"), (40, "device", "device"), (24.5, "device", "device"), (22, "device", "host"),
     (16, "host", "host")],
)  # fmt: skip
def test_the_preview_profiles_text_encoder_lies_beside_the_other_one_where_both_fit(
    gigabytes: float, text_encoder: str, trainers: str
) -> None:
    plan = plan_memory(int(gigabytes * GB), CHROMA, MemoryChoice())
    assert (plan.text_encoder, plan.trainer_text_encoder) == (text_encoder, trainers)
    alone = estimate_bytes(replace(plan, trainer_text_encoder="host"), CHROMA)
    assert plan.estimated_bytes - alone == (CHROMA.text_encoder if trainers == "device" else 0)


def test_adapters_beside_the_weights_are_counted() -> None:
    without = replace(CHROMA, beside=0)
    plan = plan_memory(24 * GB, CHROMA, MemoryChoice())
    assert plan.estimated_bytes - estimate_bytes(plan, without) == CHROMA.beside
    least = plan_memory(12 * GB, CHROMA, MemoryChoice()).estimated_bytes
    with pytest.raises(OutOfMemory):
        plan_memory(least - 1, CHROMA, MemoryChoice())
    assert plan_memory(least - 1, without, MemoryChoice()).estimated_bytes == least - CHROMA.beside


def test_what_the_operator_decides_is_kept() -> None:
    choice = MemoryChoice(weights="float8", text_encoder="host", master="host", tiling="on")
    plan = plan_memory(80 * GB, CHROMA, choice)
    assert (plan.weights, plan.text_encoder, plan.master, plan.tile_autoencoder) == (
        "float8",
        "host",
        "host",
        True,
    )


def test_too_little_memory_is_said_with_numbers() -> None:
    with pytest.raises(OutOfMemory, match=r"has 8\.0 GB .* needs 11\.\d GB .*: close what else holds its memory$"):
        plan_memory(8 * GB, CHROMA, MemoryChoice())
    forced = MemoryChoice(24 * GB, weights="dequantized", text_encoder="device", tiling="off")
    with pytest.raises(OutOfMemory) as raised:
        plan_memory(24 * GB, CHROMA, forced)
    assert "allow more than --device-memory 24.0 GB" in raised.value.message
    assert (
        "leave out --weights dequantized and --text-encoder-place device and --tiling off" in raised.value.message
    )


@pytest.mark.parametrize(
    ("second", "weights", "master"),
    [(80, "dequantized", "device"), (24, "dequantized", "device"), (14, "float8", "host")],
)
def test_a_pairs_second_device_needs_room_for_the_transformer_alone(
    second: int, weights: str, master: str
) -> None:
    plan = plan_memory(80 * GB, CHROMA, MemoryChoice(), second_bytes=second * GB)
    assert (plan.weights, plan.master) == (weights, master)
    assert estimate_second_bytes(plan, CHROMA) <= second * GB
    assert estimate_second_bytes(plan, CHROMA) < estimate_bytes(plan, CHROMA) == plan.estimated_bytes


def test_a_pair_whose_second_device_is_too_small_is_told_so() -> None:
    with pytest.raises(OutOfMemory, match=r"the pair's second device has 8\.0 GB"):
        plan_memory(80 * GB, CHROMA, MemoryChoice(), second_bytes=8 * GB)
    with pytest.raises(OutOfMemory, match=r"^the device has 8\.0 GB .* leave out --cfg-parallel"):
        plan_memory(8 * GB, CHROMA, MemoryChoice(), second_bytes=80 * GB)
