"""Tables of docs/performance.md that tell of small cards."""

from __future__ import annotations

from collections.abc import Iterator

from bench.results_file import Json, judge, table

TARGETS = {12.0: 1.12, 10.0: 1.18, 8.0: 1.25}
"""GiB free to how many times as long as the whole card an image with guidance may take at 1024×1024."""
CASES = {"guidance": "1024×1024 s", "512": "512×512 s", "single pass": "one pass, 8 steps, s"}


def _cards(result: Json) -> list[Json]:
    """The whole card, then the largest first."""
    return sorted(result["rows"], key=lambda row: (row["gib"] is not None, -(row["gib"] or 0)))


def _rows(result: Json) -> Iterator[Json]:
    return (row for row in _cards(result) if "failed" not in row)


def _name(row: Json) -> str:
    return "whole" if row["gib"] is None else f"{row['gib']:g} GiB"


def _case(row: Json, name: str) -> Json:
    found: Json = next(f for f in row["figures"] if f["case"] == name)
    return found


def _whole(result: Json) -> Json:
    found: Json = next(row for row in _rows(result) if row["gib"] is None)
    return found


def _ratio(result: Json, f: Json, seconds: float) -> str:
    return f"{seconds:.3f} (× {seconds / _case(_whole(result), f['case'])['total_s']:.3f})"


def _plan(row: Json) -> str:
    plan = row["plan"]
    told = [f"weights {plan['weights']}", f"T5 on {plan['text_encoder']}", f"master {plan['master']}"]
    told += ["autoencoder in tiles"] if plan["tile_autoencoder"] else []
    told += [] if plan["record_graphs"] else ["no graphs"]
    told += [f"{plan['streamed_blocks']} blocks streamed"] if plan["streamed_blocks"] else []
    return ", ".join(told)


def cards_table(result: Json) -> str:
    """What each size takes."""
    rows = []
    for row in _cards(result):
        if "failed" in row:
            rows.append([_name(row), f"failed: {row['failed']}", *[""] * 7])
            continue
        guided = _case(row, "guidance")
        target = TARGETS.get(row["gib"])
        whole = _case(_whole(result), "guidance")["total_s"]
        bits = {f["equal_bits"] for f in row["figures"]}
        rows.append(
            [
                _name(row),
                _plan(row),
                *(_ratio(result, f, f["total_s"]) for f in (_case(row, name) for name in CASES)),
                "" if target is None else f"× {target}: {judge(guided['total_s'] / whole, target)}",
                f"{row['peak_bytes'] / 1e9:.2f} of {row['free_bytes'] / 1e9:.2f}",
                f"{row['host_bytes'] / 1e9:.1f}",
                "**no**" if False in bits else "yes" if bits == {True} else "",
            ]
        )
    names = ("free", "plan", *CASES.values(), "target", "GB by the driver", "GB of the host", "bits equal")
    return table(names, rows)


def copies_table(result: Json) -> str:
    """What the blocks' copies do in each step."""
    rows = [
        [
            _name(row),
            f"{f['side']}×{f['side']}{', one pass' if f['guidance'] <= 1 else ''}",
            f"{f['bytes_a_step'] / 1e9:.2f}",
            f"{f['rate'] / 1e9:.1f}",
            f"{1000 * f['step_s']:.1f}",
            f"{1000 * f['waited_s_a_step']:.1f}",
            f"{100 * f['hidden']:.0f} %",
        ]
        for row in _rows(result)
        for f in row["figures"]
        if f["rate"] is not None
    ]
    return table(("free", "image", "GB copied a step", "GB/s", "ms a step", "ms of it waited", "hidden"), rows)


def predicted_table(result: Json) -> str:
    """Seconds with other links."""
    links = next((list(f["predicted"]) for row in _rows(result) for f in row["figures"] if f["predicted"]), [])
    rows = [
        [_name(row), *(_ratio(result, f, f["predicted"][link]) for f in row["figures"] for link in links)]
        for row in _rows(result)
        if all(f["predicted"] for f in row["figures"])
    ]
    header = [f"{told}, {link}" for told in CASES.values() for link in links]
    return table(["free", *(f"predicted: {name}" for name in header)], rows)
