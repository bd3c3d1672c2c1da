"""docs/api.md against the code: every field, warning and error that callers meet has its place there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from chromarpc.v1 import generation_service_pb2
from chromarpc_server.domain.error_table import ENTRIES
from chromarpc_server.domain.trainer import TRAINER_DTYPES, UNSUPPORTED_QTYPES
from chromarpc_server.domain.warning_codes import WarningCode

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
NAMES = set(re.findall(r"[A-Za-z0-9_]+", PAGE))
REASON = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")


def request_fields(descriptor: Descriptor) -> set[str]:
    found = set()
    for field in descriptor.fields:
        found.add(field.name)
        if field.message_type is not None and field.message_type.file.package == "chromarpc.v1":
            found |= request_fields(field.message_type)
    return found - {f"ctrl_img_{number}" for number in (1, 2, 3)} - {"every_n_steps", "max_side_px", "ctrl_img"}


@pytest.mark.parametrize(
    "known",
    [
        request_fields(generation_service_pb2.GenerateRequest.DESCRIPTOR),
        {code.value for code in WarningCode},
        {entry.reason for entry in ENTRIES},
        {*TRAINER_DTYPES, *UNSUPPORTED_QTYPES},
    ],
    ids=["fields", "warnings", "errors", "trainer"],
)
def test_everything_is_told_of(known: set[str]) -> None:
    assert len(known) >= 9
    assert known - NAMES == set()


def test_no_warning_is_told_of_that_does_not_exist() -> None:
    section = PAGE.split("## Warnings")[1].split("## Errors")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    assert {name for row in rows for name in REASON.findall(row)} == {*WarningCode}
