"""Every warning, every reason and every event of the log has its row in the documents, and nothing else has."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterator
from pathlib import Path

from chromarpc_server.domain.error_table import ENTRIES
from chromarpc_server.domain.warning_codes import WarningCode
from chromarpc_server.jobs.encoding import CHUNK_BYTES

ROOT = Path(__file__).parents[2]
LOG_METHODS = ("debug", "info", "warning", "error", "exception", "critical", "log")


def parsed(path: Path) -> ast.Module:
    """Without collecting garbage meanwhile: what an earlier test left may log a traceback as it goes, which parses
    too, and Python before 3.11.8 then takes the outer parsing for broken.
    """
    gc.disable()
    try:
        return ast.parse(path.read_bytes())
    finally:
        gc.enable()


def calls() -> Iterator[ast.Call]:
    for path in sorted((ROOT / "server" / "chromarpc_server").rglob("*.py")):
        yield from (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call))


def given_codes() -> Iterator[ast.expr]:
    """What calls that make a warning give as its code."""
    for call in calls():
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        is_added = name == "add" and ast.unparse(call.func).endswith("warnings.add")
        if is_added or name in ("PlanWarning", "warn", "Warning"):
            yield call.args[0] if call.args else next(k.value for k in call.keywords if k.arg == "code")


def log_events() -> set[str]:
    """Names such as `job.accepted` that are logged, read from calls of `log` and from tables of names."""
    found = set()
    for path in sorted((ROOT / "server" / "chromarpc_server").rglob("*.py")):
        tree = parsed(path)
        for call in ast.walk(tree):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and ast.unparse(call.func.value) == "log"
                and call.func.attr in LOG_METHODS
            ):
                said = call.args[1 if call.func.attr == "log" else 0]
                if isinstance(said, ast.Subscript):  # a table of this module
                    table = ast.unparse(said.value)
                    said = next(
                        node.value
                        for node in ast.walk(tree)
                        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table and node.value
                    )
                texts = [
                    n.value for n in ast.walk(said) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                assert texts, f"no name in {ast.unparse(call)}"
                found |= set(texts)
    return found


def rows(page: str, heading: str) -> set[str]:
    """The names in the first column of the table below a heading."""
    text = (ROOT / "docs" / page).read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    first = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}


def test_every_warning_has_its_row_in_the_api_page() -> None:
    assert rows("api.md", "Warnings") == {*WarningCode}


def test_every_warning_is_given_by_its_name_in_the_table() -> None:
    given = {ast.unparse(code) for code in given_codes()}
    assert not any(isinstance(code, ast.Constant) for code in given_codes())
    assert {f"WarningCode.{code}" for code in WarningCode} <= given


def test_every_reason_has_its_row_in_the_api_page() -> None:
    assert rows("api.md", "Errors") == {entry.reason for entry in ENTRIES}


def test_every_event_of_the_log_has_its_row_in_the_operations_page() -> None:
    assert rows("operations.md", "Logs") == log_events()


def test_what_is_said_of_the_size_of_chunks_is_true() -> None:
    size = f"{CHUNK_BYTES // 1024} KiB"
    for page in (
        "client/chromarpc/channel.py",
        "client/typescript/src/node.ts",
        "protos/chromarpc/v1/job_event.proto",
        "docs/api.md",
    ):
        text = (ROOT / page).read_text("utf-8")
        said = [line for line in text.splitlines() if re.search(r"parts? of|chunk.*KiB|128 KiB", line)]
        about = [line for line in said if re.search(r"[Ii]mage", line) and re.search(r"[KM]iB", line)]
        assert about, page
        assert all(size in line for line in about), page
