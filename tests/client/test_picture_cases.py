"""What is written down for other readers of pictures is what this package says today."""

from __future__ import annotations

import base64
import json

from tests.client.picture_cases import FILE, made, said


def test_what_the_page_is_held_to_is_what_this_package_says() -> None:
    cases = json.loads(FILE.read_text(encoding="utf-8"))
    files = {name: base64.b64decode(text) for name, text in cases.pop("files").items()}
    assert files.keys() == made().keys(), "run: python -m tests.client.picture_cases"
    found = said(files)
    assert found["pictures"] == cases["pictures"]
    assert found["comparisons"] == cases["comparisons"]


def test_the_cases_say_of_every_picture_made_anew_what_they_say_of_the_one_written_down() -> None:
    cases = json.loads(FILE.read_text(encoding="utf-8"))
    assert said(made())["pictures"] == cases["pictures"]
    assert FILE.stat().st_size < 200_000
