"""A run's folder: which samples it has, which adapter each was drawn with, and that nothing else is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chromarpc.replay import run_folder
from chromarpc.replay.config_file import ConfigError, read_config
from chromarpc.replay.pairing import Pairing, pair
from chromarpc.replay.run_folder import RunFolder, Unreadable
from chromarpc.replay.settings import resolve_run
from tests.client.replay_fake_server import TIME_MS, Run, picture, safetensors, trainer_jpeg

RUNS = Path(__file__).parent.parent / "goldens" / "preview_runs"
JPEG = trainer_jpeg(picture(prompt="a"))


def paired(run: Run) -> Pairing:
    run.write_config()
    with RunFolder(run.path) as folder:
        name, content = folder.config()
        return pair(resolve_run(read_config(content, name, environment={})), folder)


def adapters(run: Run) -> dict[tuple[int, int], tuple[str | None, str | None]]:
    """Adapter and reason by step and index."""
    return {(row.file.step, row.file.index): (row.checkpoint, row.reason) for row in paired(run).rows}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.mark.parametrize("folder", ["exact", "rounded"])
def test_recorded_runs_pair_as_the_trainer_recorded(folder: str, tmp_path: Path) -> None:
    expected = json.loads((RUNS / folder / "expected.json").read_text())
    (tmp_path / "samples" / ".thumbs").mkdir(parents=True)
    (tmp_path / "samples" / ".tmp").mkdir()
    (tmp_path / "config.yaml").write_bytes((RUNS / folder / "config.yaml").read_bytes())
    for recorded in expected["samples"]:
        (tmp_path / recorded["file"]).write_bytes(JPEG)
        name = Path(recorded["file"]).name
        (tmp_path / "samples" / ".thumbs" / f"{name}.jpg").write_bytes(JPEG)
    for name, metadata in expected["adapters"].items():
        step = json.loads(metadata["training_info"])["step"]
        (tmp_path / name).write_bytes(safetensors(step))
    with RunFolder(tmp_path) as opened:
        name, content = opened.config()
        found = pair(resolve_run(read_config(content, name, environment={})), opened)
    assert found.ignored == ()
    assert [
        (row.file.name, row.file.step, row.file.index, row.checkpoint, row.checkpoint_kept) for row in found.rows
    ] == [
        (one["file"], one["step"], one["index"], one["checkpoint"], one["checkpoint_kept"])
        for one in expected["samples"]
    ]
    deleted = [row.reason for row in found.rows if row.reason]
    assert deleted == (["checkpoint deleted (max_step_saves_to_keep: 1)"] * 3 if folder == "rounded" else [])


def test_the_latest_sample_of_a_step_and_index_counts(run: Run) -> None:
    run.write_sample(0, 0, JPEG, time_ms=TIME_MS + 5)
    run.write_sample(0, 0, JPEG, time_ms=TIME_MS)
    run.write_sample(0, 0, JPEG, time_ms=TIME_MS + 2)
    found = paired(run)
    assert [row.file.time_ms for row in found.rows] == [TIME_MS + 5]
    assert [ignored.reason for ignored in found.ignored] == ["drawn again later"] * 2


def test_foreign_files_are_named_and_thumbnails_are_not(run: Run) -> None:
    run.write_sample(0, 0, JPEG)
    samples = run.path / "samples"
    for folder in (".thumbs", ".tmp"):
        (samples / folder).mkdir()
        (samples / folder / f"{TIME_MS}__000000000_0.jpg.jpg").write_bytes(JPEG)
    foreign = [
        f"{TIME_MS}__000000250_0.jpg.jpg",
        f"{TIME_MS}__250_0.jpg",
        "holiday.jpg",
        f"{TIME_MS}__000000250_0.mp4",
    ]
    for name in foreign:
        (samples / name).write_bytes(JPEG)
    found = paired(run)
    assert len(found.rows) == 1
    assert sorted(ignored.name for ignored in found.ignored) == sorted(f"samples/{name}" for name in foreign)


def test_the_last_step_has_the_adapter_without_a_number(run: Run) -> None:
    run.write_adapter("my_run.safetensors", 500)
    run.write_adapter("my_run_000000250.safetensors", 250)
    for step in (250, 500):
        run.write_sample(step, 0, JPEG)
    assert adapters(run) == {
        (250, 0): ("my_run_000000250.safetensors", None),
        (500, 0): ("my_run.safetensors", None),
    }


def test_a_last_adapter_that_does_not_say_its_step_is_the_last_samples(run: Run) -> None:
    run.write_adapter("my_run.safetensors", None)
    for step in (250, 400):
        run.write_sample(step, 0, JPEG)
    found = adapters(run)
    assert found[400, 0] == ("my_run.safetensors", None)
    assert found[250, 0] == ("my_run_000000250.safetensors", "checkpoint deleted (max_step_saves_to_keep: 4)")


def test_a_last_adapter_of_an_earlier_end_is_not_the_last_samples(run: Run) -> None:
    run.write_adapter("my_run.safetensors", 250)
    for step in (250, 500):
        run.write_sample(step, 0, JPEG)
    found = adapters(run)
    assert found[250, 0] == ("my_run.safetensors", None)
    assert found[500, 0][1] == "checkpoint deleted (max_step_saves_to_keep: 4)"


def test_a_name_may_itself_end_like_a_step(run: Run) -> None:
    run.name = "frm_000000250"
    run.write_adapter("frm_000000250.safetensors", 500)
    run.write_adapter("frm_000000250_000000250.safetensors", 250)
    for step in (250, 500):
        run.write_sample(step, 0, JPEG)
    assert adapters(run) == {
        (250, 0): ("frm_000000250_000000250.safetensors", None),
        (500, 0): ("frm_000000250.safetensors", None),
    }


def test_a_numbered_adapter_that_says_another_step_is_not_taken(run: Run) -> None:
    run.write_adapter("my_run_000000250.safetensors", 125)
    run.write_sample(250, 0, JPEG)
    assert adapters(run)[250, 0][1] == "my_run_000000250.safetensors says that it was saved at step 125"


def test_a_step_that_saves_nothing_is_said(run: Run) -> None:
    run.write_sample(100, 0, JPEG)
    assert adapters(run)[100, 0] == (None, "no checkpoint was saved at this step (save_every: 250)")


@pytest.mark.parametrize(
    ("step", "change", "says"),
    [
        (0, {"network": {"type": "lora", "pretrained_lora_path": "/x"}}, "went on from another adapter"),
        (250, {"network": None}, "trains the whole model"),
        (0, {"sample": {"seed": -1}}, "its seed was drawn at random"),
        (0, {"sample": {"prompts": []}}, "the config has no sample 0"),
        (0, {"sample": {"prompts": ["by ${WHO}"]}}, r"\$\{WHO\}.*--allow-env WHO"),
    ],
)
def test_what_cannot_be_drawn_has_a_reason(run: Run, step: int, change: dict[str, object], says: str) -> None:
    for name, value in change.items():
        setattr(run, name, value)
    run.write_adapter("my_run_000000250.safetensors", 250)
    run.write_sample(step, 0, JPEG)
    import re

    reason = adapters(run)[step, 0][1]
    assert reason is not None
    assert re.search(says, reason)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no safetensors file"),
        (b"\xff" * 8 + b"{}", "is no safetensors file"),
        (b"\x02" + b"\0" * 7 + b"[]", "is no safetensors file"),
        (safetensors(250, base_model="flux1"), "an adapter of another model: 'flux1'"),
    ],
)
def test_an_adapter_that_cannot_be_used_has_a_reason(run: Run, content: bytes, says: str) -> None:
    run.write_sample(250, 0, JPEG)
    (run.path / "my_run_000000250.safetensors").write_bytes(content)
    checkpoint, reason = adapters(run)[250, 0]
    assert checkpoint == "my_run_000000250.safetensors"
    assert reason is not None
    assert says in reason


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
class TestLinks:
    @pytest.fixture(params=[True, False])
    def door(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """The folder opened by descriptors, and as on systems that cannot."""
        monkeypatch.setattr(run_folder, "_BENEATH", request.param)

    @pytest.mark.usefixtures("door")
    def test_links_are_not_followed(self, run: Run, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        for name in ("config.yaml", "a.safetensors", f"{TIME_MS}__000000000_0.jpg"):
            (outside / name).write_bytes(b"secret")
        run.path.mkdir()
        (run.path / "config.yaml").symlink_to(outside / "config.yaml")
        (run.path / "a.safetensors").symlink_to(outside / "a.safetensors")
        (run.path / "samples").symlink_to(outside)
        (run.path / "real").mkdir()
        (run.path / "real" / "a.jpg").symlink_to(outside / f"{TIME_MS}__000000000_0.jpg")
        with RunFolder(run.path) as folder:
            with pytest.raises(ConfigError, match=r"config.yaml is a link"):
                folder.config()
            assert folder.names("samples") == []
            assert folder.samples().samples == ()
            for name in ("a.safetensors", f"samples/{TIME_MS}__000000000_0.jpg", "real/a.jpg"):
                with pytest.raises(Unreadable, match="link"):
                    folder.read(name, 100)

    @pytest.mark.usefixtures("door")
    @pytest.mark.parametrize("name", ["../x", "/etc/hostname", "samples/../../x", "a//b", ".", ""])
    def test_names_lead_nowhere_else(self, run: Run, name: str) -> None:
        run.write_config()
        (run.path.parent / "x").write_text("secret")
        with RunFolder(run.path) as folder, pytest.raises(Unreadable):
            folder.read(name, 100)

    @pytest.mark.usefixtures("door")
    def test_plain_files_are_read(self, run: Run) -> None:
        run.write_config()
        sample = run.write_sample(0, 0, JPEG)
        with RunFolder(run.path) as folder:
            assert folder.read(f"samples/{sample.name}", len(JPEG)) == JPEG
            with pytest.raises(Unreadable, match="more than 10 bytes"):
                folder.read(f"samples/{sample.name}", 10)

    def test_a_job_whose_name_is_a_path_finds_no_adapter(self, run: Run, tmp_path: Path) -> None:
        run.name = "../outside"
        run.write_sample(250, 0, JPEG)
        (tmp_path / "outside_000000250.safetensors").write_bytes(safetensors(250))
        assert adapters(run)[250, 0][1] == "checkpoint deleted (max_step_saves_to_keep: 4)"

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
    def test_a_pipe_is_not_waited_for(self, run: Run) -> None:
        run.path.mkdir()
        os.mkfifo(run.path / "config.yaml")
        with RunFolder(run.path) as folder, pytest.raises(ConfigError, match="no plain file"):
            folder.config()


def test_a_folder_without_a_config_is_no_run_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder, pytest.raises(ConfigError, match="no run folder of ai-toolkit"):
        folder.config()


def test_a_config_of_100_mb_is_refused_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(100_000_000)
    with RunFolder(tmp_path) as folder, pytest.raises(ConfigError, match="no training config"):
        folder.config()
