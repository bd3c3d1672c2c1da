"""`chromarpc replay` that is begun again, waits, or is ended in the middle."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from chromarpc.cli.replay import _Lines
from chromarpc.client import Client
from chromarpc.replay.drawing import Interrupted
from chromarpc.replay.run_folder import RunFolder
from chromarpc.replay.session import Options
from chromarpc.replay.session import replay as replay_folder
from tests.client.client_fake_server import PATIENCE_S, Request, abort, detailed_status
from tests.client.replay_command import Replay
from tests.client.replay_fake_server import Run


class TestGoingOn:
    def test_what_was_drawn_is_not_drawn_again(self, replay: Replay, run: Run) -> None:
        run.write_all()
        replay()
        drawn = len(replay.server.requests)
        replay()
        assert len(replay.server.requests) == drawn
        assert replay.facts["summary"]["identical"] == 6

    def test_only_what_changed_or_broke_is_drawn_again(self, replay: Replay, run: Run) -> None:
        run.write_all()
        replay()
        replay.server.requests.clear()
        (replay.out / replay.sample(0, 0)["picture"]).write_bytes(b"broken")
        run.write_adapter("my_run.safetensors", 500, content=b"trained on")
        replay(exit_code=7)
        again = sorted((bool(request.loras), request.prompts[0].seed) for request in replay.server.requests)
        assert again == [(False, 42), (True, 42), (True, 43)]

    @pytest.mark.parametrize("state", [b"", b"[]", b"{}", b'{"format": 1, "pictures": {"a": 1}}', b"\xff"])
    def test_a_state_that_cannot_be_read_is_begun_anew(self, replay: Replay, run: Run, state: bytes) -> None:
        run.write_all(steps=(0,))
        replay.out.mkdir()
        (replay.out / "state.json").write_bytes(state)
        replay()
        assert replay.facts["summary"]["identical"] == 2

    def test_a_server_that_goes_away_ends_it_and_what_was_drawn_stays(
        self, replay: Replay, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("chromarpc.replay.drawing.RETRY_WAITS_S", (0.0,))
        run.write_all()
        away = threading.Event()

        def before(request: Request, context: Any) -> None:
            if request.loras or away.is_set():
                away.set()
                abort(context, detailed_status(grpc.StatusCode.UNAVAILABLE, "gone", reason=""))

        replay.server.before = before
        result = replay("--in-flight", "1", exit_code=3)
        assert "cannot reach" in result.stderr
        assert f"What was drawn is kept in {replay.out}" in result.stderr
        assert not (replay.out / "index.html").exists()
        replay.server.before = lambda request, context: None
        replay.server.requests.clear()
        replay()
        assert all(request.loras for request in replay.server.requests)
        assert replay.facts["summary"]["identical"] == 6

    def test_a_full_queue_is_waited_for(self, replay: Replay, run: Run) -> None:
        run.write_all()
        refused: list[int] = []

        def before(request: Request, context: Any) -> None:
            if request.loras and len(refused) < 5:
                refused.append(1)
                full = detailed_status(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after_s=0.01
                )
                abort(context, full)

        replay.server.before = before
        replay()
        assert (len(refused), replay.facts["summary"]["identical"]) == (5, 6)

    def test_several_are_asked_for_at_once_as_far_as_the_server_lets_it(self, replay: Replay, run: Run) -> None:
        run.sample = {"prompts": [f"prompt {number}" for number in range(8)]}
        run.write_all(steps=(0,))
        together = threading.Barrier(3)

        def before(request: Request, context: Any) -> None:
            if request.prompts[0].prompt in ("prompt 1", "prompt 2", "prompt 3"):
                together.wait(PATIENCE_S)

        replay.server.before = before
        replay.server.limits = {"max_streams": 3, "max_queued_jobs": 32}
        replay()
        assert replay.server.most_at_once == 3

    def test_a_client_that_is_closed_in_the_middle_ends_it_at_once(self, replay: Replay, run: Run) -> None:
        run.write_all()
        started = threading.Event()

        def before(request: Request, context: Any) -> None:
            started.set()
            assert gone.wait(PATIENCE_S)

        gone = threading.Event()
        replay.server.before = before
        with Client(replay.server.target) as client, RunFolder(run.path) as folder, ThreadPoolExecutor(1) as pool:
            watcher = _Lines(quiet=True)
            ended = pool.submit(replay_folder, client, folder, Options(out=replay.out), watcher)
            assert started.wait(PATIENCE_S)
            client.close()
            with pytest.raises(Interrupted):
                ended.result(PATIENCE_S)
            gone.set()

    def test_a_quota_that_no_waiting_helps_is_a_reason(self, replay: Replay, run: Run) -> None:
        run.write_all(steps=(0,))

        def before(request: Request, context: Any) -> None:
            status = detailed_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large", reason="QUOTA_EXCEEDED")
            abort(context, status)

        replay.server.before = before
        replay("--noise-draw", "float32", exit_code=8)
        assert replay.sample(0, 0)["reason"] == "too large"
