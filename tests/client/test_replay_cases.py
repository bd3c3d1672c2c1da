"""The cases that the page's replay is held to are what the Python client makes of them today."""

from __future__ import annotations

import json

from tests.client import replay_cases


def test_the_cases_that_the_page_is_held_to_are_current() -> None:
    written = json.loads(replay_cases.FILE.read_text("utf-8"))
    today = json.loads(replay_cases.text())
    assert written.keys() == today.keys()
    for kind in today:
        assert written[kind] == today[kind], f"{kind}: run python -m tests.client.replay_cases"
