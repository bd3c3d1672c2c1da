"""`chromarpc replay` of folders, samples, adapters and options that are not as they should be."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.client.client_fake_server import Request, abort, detailed_status
from tests.client.replay_command import Replay
from tests.client.replay_fake_server import Run, picture, trainer_jpeg


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "no run folder of ai-toolkit"),
            (b"a: 1", "no training config of ai-toolkit"),
            (b"a: &a [*a]", "holds itself"),
            (b"config: {name: x, process: [{model: {arch: flux}}]}", "the run trains 'flux'"),
            (b"config: {name: x, process: [{model: {arch: chroma}}]}", "there is no sample"),
        ],
    )
    def test_a_folder_that_is_no_run_is_one_line_and_nothing_is_written(
        self, replay: Replay, content: bytes | None, says: str
    ) -> None:
        replay.folder.mkdir()
        if content is not None:
            (replay.folder / "config.yaml").write_bytes(content)
        result = replay(exit_code=8)
        assert says in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not replay.out.exists()

    def test_a_folder_that_is_not_there_is_a_wrong_command_line(self, replay: Replay) -> None:
        assert "not a folder" in replay(exit_code=2).stderr

    def test_a_broken_sample_has_a_reason_and_the_rest_goes_on(self, replay: Replay, run: Run) -> None:
        run.write_all()
        broken = run.write_sample(250, 0, trainer_jpeg(picture(prompt="a"))[:200])
        (run.path / "samples" / "holiday.jpg").write_bytes(b"")
        result = replay()
        assert replay.sample(250, 0)["reason"] == "the trainer's file is no picture, or a broken one"
        assert (broken.name in result.stderr, "holiday.jpg" in result.stderr) == (False, True)
        assert replay.facts["summary"]["drawn"] == 5
        assert replay.facts["ignored"] == [
            {"file": "samples/holiday.jpg", "reason": "not named like a sample of ai-toolkit"}
        ]

    @pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
    def test_names_that_are_no_text_are_written_all_the_same(self, replay: Replay, run: Run) -> None:
        run.write_all(steps=(0,))
        Path(os.fsdecode(os.fsencode(run.path / "samples") + b"/\xff.jpg")).write_bytes(b"")
        replay()
        assert replay.facts["ignored"][0]["file"] == "samples/\udcff.jpg"

    def test_a_sample_that_is_a_link_or_a_folder_has_a_reason(self, replay: Replay, run: Run) -> None:
        run.write_all(steps=(0,))
        linked = run.write_sample(0, 1, b"")
        linked.unlink()
        outside = run.path.parent / "outside.jpg"
        outside.write_bytes(trainer_jpeg(picture(prompt="a")))
        linked.symlink_to(outside)
        folder = run.write_sample(0, 0, b"")
        folder.unlink()
        folder.mkdir()
        replay(exit_code=8)
        assert replay.sample(0, 0)["reason"] == f"samples/{folder.name} is no plain file"
        assert "is a link" in replay.sample(0, 1)["reason"]
        assert replay.sample(0, 1)["trainer_sha256"] is None

    def test_an_adapter_that_the_server_refuses_costs_its_rows_only(self, replay: Replay, run: Run) -> None:
        hashes = run.write_all()

        def before(request: Request, context: Any) -> None:
            if request.loras and request.loras[0].path.endswith(hashes[250]):
                status = detailed_status(
                    grpc.StatusCode.FAILED_PRECONDITION, "the LoRA fits no layer", reason="LORA_INCOMPATIBLE"
                )
                abort(context, status)

        replay.server.before = before
        replay()
        assert replay.sample(250, 0)["reason"] == "the LoRA fits no layer"
        assert replay.facts["summary"]["line"] == "4 of 6 samples drawn again; 2 not: the LoRA fits no layer."

    def test_a_config_that_was_changed_since_shows_in_the_size(self, replay: Replay, run: Run) -> None:
        run.write_all(steps=(0,), width=96)
        replay(exit_code=8)
        assert replay.sample(0, 0)["reason"] == (
            "it has 96×64 pixels and the config says 64×64: the config was changed since"
        )

    def test_a_server_without_the_trainers_profiles_is_said(self, replay: Replay, run: Run) -> None:
        run.write_all(steps=(0,))
        replay.server.profiles = ("reference", "fp8")
        assert "serves none of the profiles preview, preview-exact" in replay(exit_code=8).stderr
        replay.server.profiles = ("reference", "preview-exact")
        replay()
        assert replay.facts["server"]["profile"] == "preview-exact"

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--steps", "a"], "--steps a: say whole numbers"),
            (["--noise-draw", "x"], "say float32 or legacy"),
            (["--allow-env", "NO_SUCH_VARIABLE_HERE"], "there is no such variable"),
        ],
    )
    def test_a_wrong_option_is_said(self, replay: Replay, run: Run, arguments: list[str], says: str) -> None:
        run.write_all(steps=(0,))
        assert says in replay(*arguments, exit_code=2).stderr
