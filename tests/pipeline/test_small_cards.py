"""What a server plans for Chroma1-Base on cards of every size, and on hosts that have little memory themselves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_holder, report_cards, small_cards
from bench.switching import FULL
from chromarpc_server.domain.errors import InvalidParameter, OutOfMemory
from chromarpc_server.domain.limits import MemoryChoice
from chromarpc_server.domain.models import MemoryPlan
from chromarpc_server.pipeline import PROFILES, Checkpoint, CheckpointFiles
from chromarpc_server.pipeline.host_memory import available_host_bytes
from chromarpc_server.pipeline.memory import (
    HOST_SPARE_BYTES,
    MARGIN_BYTES,
    PartSizes,
    estimate_bytes,
    plan_memory,
)
from chromarpc_server.pipeline.streamed import BlockSizes

GIB = 1024**3
CONTEXT_BYTES = 500_000_000
"""Of the driver, taken before anything is planned."""


def _chroma() -> PartSizes:
    """Of Chroma1-Base, T5-XXL and Flux's autoencoder, in bf16."""
    torch = pytest.importorskip("torch")
    from chromarpc_server.pipeline.models.transformer import ChromaTransformer

    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in ChromaTransformer(FULL).state_dict().items()}
    elements = sum(math.prod(shape) for shape in shapes.values())
    assert elements == 8_899_983_424
    in_blocks = sum(math.prod(s) for name, s in shapes.items() if "_blocks." in name and len(s) > 1)
    return PartSizes(
        master=2 * elements,
        dequantized=2 * elements,
        float8=2 * elements - in_blocks,
        text_encoder=4_894_107_648,
        autoencoder=167_639_366,
        beside=sum(sum(s) for s in shapes.values() if len(s) == 2) * 128,
        blocks=BlockSizes.of(shapes),
    )


CHROMA = _chroma()


def _plan(gib: float, choice: MemoryChoice | None = None, *, host_gib: float | None = 64) -> MemoryPlan:
    host_bytes = None if host_gib is None else int(host_gib * GIB)
    return plan_memory(int(gib * GIB) - CONTEXT_BYTES, CHROMA, choice or MemoryChoice(), host_bytes=host_bytes)


@pytest.mark.parametrize(
    ("gib", "weights", "text_encoder", "tiles", "graphs", "streamed"),
    [
        (79, "dequantized", "device", False, True, 0),
        (24, "float8", "device", False, True, 0),
        (16, "float8", "host", False, True, 0),
        (13, "float8", "host", False, False, 0),
        (12, "float8", "host", True, False, 0),
        (11, "float8", "host", False, False, 11),
        (10, "float8", "host", False, False, 20),
        (8, "float8", "host", False, False, 35),
        (6, "float8", "host", False, False, 50),
        (4.5, "float8", "host", False, False, 57),
        (4, "float8", "host", True, False, 56),
    ],
)
def test_cards_of_every_size(
    gib: float, weights: str, text_encoder: str, tiles: bool, graphs: bool, streamed: int
) -> None:
    plan = _plan(gib)
    found = (plan.weights, plan.text_encoder, plan.tile_autoencoder, plan.record_graphs, plan.streamed_blocks)
    assert found == (weights, text_encoder, tiles, graphs, streamed)
    assert plan.estimated_bytes == estimate_bytes(plan, CHROMA) <= plan.usable_bytes


def test_as_many_blocks_stay_as_fit_beside_the_margin() -> None:
    for hundredths in range(460, 1140, 7):
        plan = _plan(hundredths / 100)
        fewer = replace(plan, streamed_blocks=plan.streamed_blocks - 1)
        assert estimate_bytes(fewer, CHROMA) > plan.usable_bytes >= plan.estimated_bytes
        without = replace(CHROMA, blocks=BlockSizes())
        held = CHROMA.float8 - CHROMA.blocks.saved_bytes(plan.streamed_blocks)
        assert plan.estimated_bytes - estimate_bytes(replace(plan, streamed_blocks=0), without) < held
        assert MARGIN_BYTES > 0.25e9


def test_the_smallest_arrangement_and_what_to_do_are_told_where_nothing_fits() -> None:
    with pytest.raises(OutOfMemory) as raised:
        _plan(3.5, MemoryChoice(4 * GIB))
    message = raised.value.message
    assert "the device has 3.3 GB of memory that may be used" in message
    assert "the smallest arrangement of this model needs 3.4 GB for images up to 1024×1024" in message
    assert "close what else holds its memory, or allow more than --device-memory 4.3 GB" in message


def test_nothing_is_streamed_where_the_settings_want_wide_weights_or_a_pair() -> None:
    with pytest.raises(OutOfMemory, match="leave out --weights dequantized"):
        _plan(8, MemoryChoice(weights="dequantized"))
    with pytest.raises(OutOfMemory, match="a pair streams no blocks"):
        plan_memory(8 * GIB, CHROMA, MemoryChoice(), second_bytes=8 * GIB)


def test_what_the_operator_decides_is_kept_where_blocks_are_streamed() -> None:
    plan = _plan(11, MemoryChoice(text_encoder="device", tiling="on"))
    assert (plan.text_encoder, plan.tile_autoencoder) == ("device", True)
    assert plan.streamed_blocks > _plan(11).streamed_blocks
    assert not _plan(4.5, MemoryChoice(tiling="off")).tile_autoencoder


@pytest.mark.parametrize(
    ("host_gib", "gib", "master", "locked"),
    [
        (64, 8, "host", 27.5),
        (64, 12, "host", 22.7),
        (14.5, 8, "mapped", 9.7),
        (14.5, 24, "mapped", 0),
        (4, 79, "device", 0),
    ],
)
def test_the_master_stays_in_its_file_where_the_host_is_too_small(
    host_gib: float, gib: float, master: str, locked: float
) -> None:
    plan = _plan(gib, host_gib=host_gib)
    assert plan.master == master
    assert plan.host_bytes == pytest.approx(locked * 1e9, abs=0.06e9)
    assert plan.host_bytes + HOST_SPARE_BYTES <= plan.host_available_bytes == int(host_gib * GIB)


def test_a_host_that_is_too_small_is_told_what_would_do() -> None:
    with pytest.raises(OutOfMemory) as raised:
        _plan(8, host_gib=8)
    message = raised.value.message
    assert "the model needs 9.8 GB of host memory" in message
    assert "of 8.6 GB that the host has free it leaves 2.1 GB to everything else" in message
    assert "on this host a device with 19.3 GB free would do" in message


def test_a_host_that_does_not_say_what_is_free_is_trusted() -> None:
    assert (_plan(8, host_gib=None).master, _plan(8, host_gib=None).host_available_bytes) == ("host", 0)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_free_host_memory_is_the_systems_within_the_limits_of_all_control_groups(tmp_path: Path) -> None:
    assert available_host_bytes(tmp_path) is None
    _write(tmp_path / "proc/meminfo", "MemTotal: 64 kB\nMemAvailable:   9000 kB\n")
    assert available_host_bytes(tmp_path) == 9000 * 1024
    _write(tmp_path / "proc/self/cgroup", "0::/outer/inner\n")
    outer = tmp_path / "sys/fs/cgroup/outer"
    for group, limit in ((outer, "5000000"), (outer / "inner", "max")):
        _write(group / "memory.max", f"{limit}\n")
        _write(group / "memory.current", "3000000\n")
        _write(group / "memory.stat", "anon 1\ninactive_file 200000\nactive_file 100000\n")
    assert available_host_bytes(tmp_path) == 2_300_000


def test_control_groups_of_version_1_count_as_well(tmp_path: Path) -> None:
    _write(tmp_path / "proc/meminfo", "MemAvailable: 9000 kB\n")
    _write(tmp_path / "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/1\n")
    # In a container the mount is the group itself.
    group = tmp_path / "sys/fs/cgroup/memory"
    _write(group / "memory.limit_in_bytes", "4000000\n")
    _write(group / "memory.usage_in_bytes", "1000000\n")
    _write(group / "memory.stat", "total_inactive_file 10\ntotal_active_file 5\n")
    assert available_host_bytes(tmp_path) == 3_000_015
    _write(group / "memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert available_host_bytes(tmp_path) == 9000 * 1024


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    import torch

    names = ("text_encoder_2", "tokenizer_2", "vae")
    files = CheckpointFiles(
        tiny_checkpoint / "chroma-mini.safetensors", *(tiny_checkpoint / name for name in names)
    )
    return Checkpoint.load(files, device=torch.device("cpu"), dtype=torch.float32)


STREAMED = MemoryPlan("float8", "host", "mapped", tile_autoencoder=False, record_graphs=False, streamed_blocks=3)


@pytest.mark.parametrize("profile", ["exact", "preview", "preview-exact"])
def test_profiles_that_need_the_whole_transformer_are_refused_by_name(
    checkpoint: Checkpoint, profile: str
) -> None:
    assert STREAMED.withholds(profile)
    assert not replace(STREAMED, streamed_blocks=0).withholds(profile)
    with pytest.raises(InvalidParameter, match=f"the profile {profile} needs the whole transformer") as raised:
        replace(checkpoint, memory=STREAMED).allocate(PROFILES[profile])
    assert raised.value.violations[0].field == "profile"


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["reference", "fp8"])
def test_a_card_that_streams_draws_the_whole_cards_images(checkpoint: Checkpoint, profile: str) -> None:
    shared = small_cards.Shared()
    cases = [small_cards.Case("guidance", 64, 2, 4.0), small_cards.Case("single pass", 64, 2, 1.0)]
    rows = []
    for plan in (None, STREAMED):
        held = replace(checkpoint, memory=plan)
        row = small_cards.measure_card(lambda held=held: held, shared, profile, cases, 1)  # type: ignore[misc]
        rows.append({"gib": None if plan is None else 8.0, "free_bytes": 10**10, "peak_bytes": 10**9, **row})
    assert [[f["equal_bits"] for f in row["figures"]] for row in rows] == [[None, None], [True, True]]
    assert rows[1]["plan"]["streamed_blocks"] == 3
    assert "same bits" in small_cards.line(rows[1], rows[0])
    json.dumps(rows)


def test_a_small_cards_prepared_weights_are_counted_without_what_is_streamed(checkpoint: Checkpoint) -> None:
    profile = PROFILES["reference"]
    streams = replace(checkpoint, memory=STREAMED)
    whole = replace(checkpoint, memory=replace(STREAMED, streamed_blocks=0)).prepared_bytes(profile)
    saved = BlockSizes.of(checkpoint.targets).saved_bytes(3)
    assert saved > 0
    assert streams.prepared_bytes(profile) == whole - saved
    prepared = streams.allocate(profile)
    prepared.switch([])
    scales = 0.06 * whole  # of such small layers
    assert 0 <= prepared.size_bytes - streams.prepared_bytes(profile) < scales


@pytest.mark.parametrize(("plan", "times"), [(None, 0), (STREAMED, 2)])
def test_what_a_stage_took_is_given_back_where_the_card_is_full(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, plan: MemoryPlan | None, times: int
) -> None:
    from chromarpc_server.pipeline import pipeline as drawing

    held = replace(checkpoint, memory=plan)
    pipeline = held.prepare([], PROFILES["reference"])
    released: list[object] = []
    monkeypatch.setattr(drawing, "release_memory", released.append)
    small_cards.draw(pipeline, small_cards.Case("guidance", 64, 1, 4.0), 1)
    assert released == times * [checkpoint.device]


class _Memory:
    """Of a GPU of 100 steps."""

    def __init__(self) -> None:
        self.held = 0

    def free(self) -> int:
        return 100 * gpu_holder.STEP_BYTES - self.held

    def hold(self, size_bytes: int) -> None:
        if size_bytes > self.free():
            raise RuntimeError("CUDA out of memory.\nmore")
        self.held += size_bytes

    def let_go(self) -> None:
        self.held = 0


def test_the_process_that_holds_a_gpus_memory_leaves_what_it_is_told_to() -> None:
    import io

    step = gpu_holder.STEP_BYTES
    memory, answers = _Memory(), io.StringIO()
    lines = io.StringIO(f"leave all\nleave {30 * step}\nlowest\nleave {50 * step + 5}\nleave {-step}\n")
    gpu_holder.serve(memory, lines, answers, lambda: True)
    found = [int(line) // step for line in answers.getvalue().splitlines()[:4]]
    assert found == [100, 30, 30, 51]
    assert answers.getvalue().splitlines()[4] == "CUDA out of memory."


class _Card:
    """In place of a GPU and of the process that holds its memory: what fits says which plan is made."""

    left: float = 80
    closed = False

    def leave(self, free_bytes: int | None) -> int:
        self.left = 80 if free_bytes is None else free_bytes / GIB
        return int(self.left * GIB)

    def peak_bytes(self) -> int:
        return int(self.left * GIB) - 1

    def close(self) -> None:
        self.closed = True

    def plan(self, *_: object) -> MemoryPlan:
        if self.left == 10:
            raise OutOfMemory("the device has too little")
        return STREAMED if self.left < 12 else replace(STREAMED, streamed_blocks=0)


@pytest.mark.slow
def test_the_bench_goes_on_where_one_size_fails_and_writes_what_it_has(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from chromarpc_server.pipeline import choose_device
    from chromarpc_server.pipeline.opening import OpenCheckpoint

    card, out = _Card(), tmp_path / "cards.json"
    monkeypatch.setattr(small_cards, "Holder", lambda: card)
    monkeypatch.setattr(small_cards, "choose_device", lambda *_: choose_device("cpu", "float32"))
    monkeypatch.setattr(OpenCheckpoint, "plan", card.plan)
    monkeypatch.setattr(small_cards, "CASES", [small_cards.Case("guidance", 64, 2, 4.0)])
    (tmp_path / "Chroma1-Base.safetensors").symlink_to(tiny_checkpoint / "chroma-mini.safetensors")
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        (tmp_path / name).symlink_to(tiny_checkpoint / name)
    options = [str(tmp_path), "--sizes", "16", "10", "8", "--runs", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["small_cards", *options])
    small_cards.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["gib"] for row in rows] == [None, 16, 10, 8]
    assert rows[2]["failed"] == "OutOfMemory: the device has too little"
    assert [row["plan"]["streamed_blocks"] for row in rows if "plan" in row] == [0, 0, 3]
    assert [row["figures"][0]["equal_bits"] for row in rows if "plan" in row] == [None, True, True]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert "10 GiB  failed: OutOfMemory" in printed[2]
    assert "3 blocks streamed" in printed[3]
    assert card.closed


def test_other_links_are_predicted_by_the_formula_that_is_told() -> None:
    given = {"text_s": 0.1, "step_s": 0.2, "decode_s": 0.05, "steps": 25, "step_bytes": 4e9}
    assert small_cards.predicted_seconds(**given, rate=25e9, text_copied_s=0.2) == pytest.approx(5.35)
    assert small_cards.predicted_seconds(**given, rate=12.5e9, text_copied_s=0.4) == pytest.approx(8.55)


def _figure(case: str, seconds: float, **other: object) -> dict[str, object]:
    side, guidance = {"guidance": (1024, 4.0), "512": (512, 4.0), "single pass": (1024, 1.0)}[case]
    figure = {"case": case, "side": side, "guidance": guidance, "total_s": seconds, "step_s": 0.2}
    return {**figure, "rate": None, "equal_bits": None, "predicted": {}, **other}


def test_the_table_says_what_failed_what_missed_its_target_and_whose_bits_differ() -> None:
    plan = {"weights": "float8", "text_encoder": "host", "master": "mapped", "tile_autoencoder": False,
            "record_graphs": False, "streamed_blocks": 35}  # fmt: skip
    copied = {"bytes_a_step": 4.76e9, "rate": 50e9, "waited_s_a_step": 0.002, "hidden": 0.98, "equal_bits": True,
              "predicted": {"PCIe Gen4 ×16": 6.0, "PCIe Gen4 ×8": 10.0}}  # fmt: skip
    names = ("guidance", "512", "single pass")
    common = {"plan": plan, "free_bytes": 8.59e9, "peak_bytes": 8.2e9, "host_bytes": 9.7e9}
    result = {
        "rows": [
            {**common, "gib": None, "figures": [_figure(name, 4.0) for name in names]},
            {**common, "gib": 10.0, "failed": "OutOfMemory: full"},
            {**common, "gib": 8.0, "figures": [_figure(name, 6.0, **copied) for name in names]},
        ]
    }
    _, _, _, failed, small = report_cards.cards_table(result).splitlines()
    assert failed.startswith("| 10 GiB | failed: OutOfMemory: full |")
    assert "| 6.000 (× 1.500) |" in small
    assert "× 1.25: **missed** | 8.20 of 8.59 | 9.7 | yes |" in small
    assert "| 8 GiB | 1024×1024 | 4.76 | 50.0 | 200.0 | 2.0 | 98 % |" in report_cards.copies_table(result)
    assert (
        report_cards.predicted_table(result)
        .splitlines()[2]
        .startswith("| 8 GiB | 6.000 (× 1.500) | 10.000 (× 2.500) |")
    )
    small_row = result["rows"][2]
    small_row["figures"][0]["equal_bits"] = False  # type: ignore[index]
    assert "| **no** |" in report_cards.cards_table(result)
