"""The tables of errors and warnings, and everything that is made from them or has to agree with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import grpc
import pytest

from chromarpc.v1 import codes_pb2
from chromarpc_server.domain.error_table import BY_REASON, ENTRIES, HttpErrorCode
from chromarpc_server.domain.warning_codes import WarningCode
from tools import code_tables

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", code_tables.files(), ids=lambda path: path.name)
def test_what_is_made_from_the_tables_is_current(path: Path) -> None:
    assert path.read_text("utf-8") == code_tables.files()[path], "run `make protos`"


def test_every_error_has_a_number_a_name_and_a_status_of_its_own() -> None:
    assert [entry.number for entry in ENTRIES] == list(range(1, len(ENTRIES) + 1))
    assert len(BY_REASON) == len({entry.kind for entry in ENTRIES}) == len(ENTRIES)
    assert {entry.status for entry in ENTRIES} <= {code.name for code in grpc.StatusCode} - {"OK"}


def test_the_contract_numbers_what_the_tables_number() -> None:
    reasons = {entry.reason: entry.number for entry in ENTRIES}
    assert values("ERROR_REASON_", codes_pb2.ErrorReason.items()) == reasons | {"UNSPECIFIED": 0}
    warnings = {code.value: code.number for code in WarningCode}
    assert values("WARNING_CODE_", codes_pb2.WarningCode.items()) == warnings | {"UNSPECIFIED": 0}


def values(prefix: str, items: Iterable[tuple[str, int]]) -> dict[str, int]:
    return {name.removeprefix(prefix): number for name, number in items if name.startswith(prefix)}


def test_somebody_knows_what_to_do_about_every_error_that_is_not_their_own_doing() -> None:
    assert [entry.reason for entry in ENTRIES if not entry.caller and not entry.operator] == ["CANCELLED"]


def test_what_the_tables_point_to_is_there() -> None:
    for entry in ENTRIES:
        if entry.more:
            page, _, anchor = entry.more.partition("#")
            heads = re.findall(r"^#+ (.+)$", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, entry


def test_every_code_of_the_gateway_is_in_a_table() -> None:
    text = (ROOT / "server/chromarpc_server/gateway/envoy.yaml").read_text("utf-8")
    named = set(re.findall(r'\bcode: "([A-Z_]+)"', text))
    named |= set(re.findall(r'\["\d+"\] = "([A-Z_]+)"', text))
    of_the_gateway = {code.value for code in HttpErrorCode if "gateway" in code.source}
    assert len(named) > 8
    assert of_the_gateway <= named <= of_the_gateway | set(BY_REASON)


def test_every_code_that_the_server_answers_over_http_is_named_by_it() -> None:
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "server/chromarpc_server").rglob("*.py"))
    answered = {code for code in HttpErrorCode if f"HttpErrorCode.{code}" in sources}
    assert answered == {code for code in HttpErrorCode if "server" in code.source}
