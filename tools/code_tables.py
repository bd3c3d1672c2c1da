"""Writes what is made from the tables of errors and warnings: the contract's enums, and tables of the docs.

python -m tools.code_tables
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from chromarpc_server.domain.error_table import ENTRIES, HttpErrorCode
from chromarpc_server.domain.warning_codes import WarningCode

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "protos/chromarpc/v1/codes.proto"
DOCS = ROOT / "docs"
WIDTH = 115
_HEADER = r"""// Made from the server's tables by `make protos`.
syntax = "proto3";

package chromarpc.v1;

option csharp_namespace = "Chromarpc.V1";
option go_package = "chromarpc/v1;chromarpcv1";
option java_multiple_files = true;
option java_outer_classname = "CodesProto";
option java_package = "chromarpc.v1";
option objc_class_prefix = "CRP";
option php_metadata_namespace = "Chromarpc\\V1\\GPBMetadata";
option php_namespace = "Chromarpc\\V1";
option ruby_package = "Chromarpc::V1";
option swift_prefix = "Chromarpc_V1_";
"""


def proto() -> str:
    """The contract's file of error reasons and warning codes."""
    reasons = [
        (entry.reason, entry.number, f"{entry.status}. {_said(entry.when, entry.caller)}") for entry in ENTRIES
    ]
    warnings = [(code.value, code.number, _said(code.when, code.caller)) for code in WarningCode]
    return "\n".join(
        (
            _HEADER,
            _enum(
                "ErrorReason",
                "Why a call or a job failed. `google.rpc.ErrorInfo.reason` and `Failed.reason` are these names "
                "without `ERROR_REASON_`, as text, so that a newer server may have more of them.",
                "No reason: the error is not of this service.",
                reasons,
            ),
            "",
            _enum(
                "WarningCode",
                "What a warning is about. `Warning.code` is one of these names without `WARNING_CODE_`, as text, "
                "so that a newer server may have more of them.",
                "Never sent.",
                warnings,
            ),
            "",
        )
    )


def _enum(name: str, about: str, unspecified: str, values: Iterable[tuple[str, int, str]]) -> str:
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()
    lines = [*_comment(about, ""), f"enum {name} {{"]
    for value, number, said in [("UNSPECIFIED", 0, unspecified), *values]:
        lines += [*_comment(said, "  "), f"  {prefix}_{value} = {number};"]
    return "\n".join([*lines, "}"])


def _comment(text: str, indent: str) -> Iterator[str]:
    start = f"{indent}// "
    yield from textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=start, break_on_hyphens=False, break_long_words=False
    )


def _said(when: str, caller: str) -> str:
    return f"{when} What to do: {caller[0].lower()}{caller[1:]}" if caller else when


def tables() -> dict[tuple[str, str], str]:
    """The documentation's tables, by page and by the name that marks their place."""
    return {
        ("api.md", "warnings"): _table(
            ("code", "when", "what to do"),
            ((f"`{code}`", code.when, code.caller) for code in WarningCode),
        ),
        ("api.md", "errors"): _table(
            ("reason", "status", "HTTP", "the same again", "when"),
            (
                (
                    f"`{entry.reason}`",
                    entry.status,
                    str(entry.http_status),
                    entry.retry.value,
                    entry.when + _link(entry.more, "api.md"),
                )
                for entry in ENTRIES
            ),
        ),
        ("operations.md", "errors"): _table(
            ("reason", "the caller", "the operator"),
            ((f"`{entry.reason}`", entry.caller, entry.operator) for entry in ENTRIES),
        ),
        ("web.md", "codes"): _table(
            ("code", "HTTP", "from the", "when", "what to do"),
            ((f"`{code}`", str(code.http_status), code.source, code.when, code.caller) for code in HttpErrorCode),
        ),
    }


def _link(target: str, page: str) -> str:
    if not target:
        return ""
    heading = target.partition("#")[2].replace("-", " ")
    return f" ([{heading}]({target.removeprefix(page)}))"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join("".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n" for cells in lines)


def with_table(text: str, name: str, table: str) -> str:
    """A page's text with the table between the marks of that name."""
    start, end = f"<!-- {name}: made by `make protos` -->\n", f"<!-- {name} end -->\n"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the page has no place for {name}")
    before, _, rest = text.partition(start)
    return f"{before}{start}{table}{end}{rest.partition(end)[2]}"


def files() -> dict[Path, str]:
    """What every file should hold, and for pages what they hold outside of the tables."""
    found = {PROTO: proto()}
    for (page, name), table in tables().items():
        path = DOCS / page
        found[path] = with_table(found.get(path) or path.read_text("utf-8"), name, table)
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, "utf-8")
