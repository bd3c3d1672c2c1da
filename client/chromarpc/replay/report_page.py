"""Writes a replay's report: `report.json`, and a page that can be sent to somebody, which needs no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageChops

from chromarpc.images import write_file
from chromarpc.replay.curve import curve_svg
from chromarpc.replay.drawing import PICTURES
from chromarpc.replay.similarity import NoPicture, decode

REPORT_NAME: Final = "report.json"
PAGE_NAME: Final = "index.html"
MAX_PAGE_BYTES: Final = 25 * 1000**2
"""Above it the page holds thumbnails, and the pictures lie beside it."""
DIFFERENCE_GAIN: Final = 8
_THUMBNAIL_SIDES: Final = ((300, 320), (900, 208), (2500, 128))
"""So many samples have thumbnails of this longer side in pixels."""
_SMALLEST_SIDE: Final = 80
_DIFFERENCE_SIDE: Final = 208
_MEDIA_TYPES: Final = {"jpg": "image/jpeg", "jpeg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


@dataclass(frozen=True)
class _Pair:
    """The pictures of one sample as the page names them."""

    theirs: str
    """Source of the picture on the page."""
    ours: str
    difference: str
    theirs_full: str
    """`-` where the one on the page is the whole."""
    ours_full: str


def write_report(
    facts: dict[str, Any], out: Path, *, theirs: Callable[[str], bytes], max_page_bytes: int = MAX_PAGE_BYTES
) -> Path:
    """Writes both files and returns the page's path.

    Args:
        facts: as `facts_of` gives them.
        out: the report's folder, which holds our pictures.
        theirs: the bytes of a file of the run.
        max_page_bytes: above it the page holds thumbnails.

    Raises:
        OSError: a file cannot be written.
    """
    samples: Sequence[Mapping[str, Any]] = facts["samples"]
    pictures = _Pictures(out, theirs, samples, max_page_bytes)
    page = _page(facts, [pictures.pair(sample) for sample in samples], inline=pictures.inline)
    write_file(out / REPORT_NAME, json.dumps(facts, indent=1).encode())
    return write_file(out / PAGE_NAME, page.encode("utf-8", "replace"))  # names of files may be no text


class _Pictures:
    """Makes the page's pictures, one sample after the other."""

    def __init__(
        self,
        out: Path,
        theirs: Callable[[str], bytes],
        samples: Sequence[Mapping[str, Any]],
        max_page_bytes: int,
    ) -> None:
        self._out = out
        self._theirs = theirs
        total = sum(len(data) for sample in samples for data in self._data(sample) if data)
        self.inline = total * 4 / 3 < max_page_bytes
        self._side = next((side for most, side in _THUMBNAIL_SIDES if len(samples) <= most), _SMALLEST_SIDE)

    def pair(self, sample: Mapping[str, Any]) -> _Pair:
        theirs, ours = self._data(sample)
        difference = _difference(theirs, ours) if theirs and ours else ""
        if self.inline:
            suffix = sample["file"].rpartition(".")[2]
            return _Pair(_source(theirs, suffix), _source(ours, suffix), difference, "-", "-")
        return _Pair(
            self._thumbnail(theirs),
            self._thumbnail(ours),
            difference,
            self._beside(sample, theirs),
            sample["picture"] or "-",
        )

    def _data(self, sample: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """The trainer's file and ours; empty where there is none."""
        theirs = self._theirs(sample["file"]) if sample["trainer_readable"] else b""
        ours = (self._out / PICTURES / Path(sample["picture"]).name).read_bytes() if sample["picture"] else b""
        return theirs, ours

    def _thumbnail(self, data: bytes) -> str:
        if not data:
            return ""
        picture = decode(data)
        picture.thumbnail((self._side, self._side), Image.Resampling.LANCZOS)
        return _source(_jpeg(picture, 82), "jpg")

    def _beside(self, sample: Mapping[str, Any], data: bytes) -> str:
        if not data:
            return "-"
        name = f"{sample['step']:09d}_{sample['index']}_trainer.{sample['file'].rpartition('.')[2]}"
        write_file(self._out / PICTURES / name, data)
        return f"{PICTURES}/{name}"


def _difference(theirs: bytes, ours: bytes) -> str:
    try:
        first, second = decode(theirs), decode(ours)
    except NoPicture:
        return ""
    if first.size != second.size:
        return ""
    picture = ImageChops.difference(first, second).point(
        [min(255, value * DIFFERENCE_GAIN) for value in range(256)] * 3
    )
    picture.thumbnail((_DIFFERENCE_SIDE, _DIFFERENCE_SIDE), Image.Resampling.BOX)
    return _source(_jpeg(picture, 80), "jpg")


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    target = io.BytesIO()
    picture.save(target, "JPEG", quality=quality)
    return target.getvalue()


def _source(data: bytes, suffix: str) -> str:
    return f"data:{_MEDIA_TYPES[suffix]};base64,{base64.b64encode(data).decode()}" if data else ""


def _page(facts: dict[str, Any], pairs: Sequence[_Pair], *, inline: bool) -> str:
    style, script = (
        resources.files("chromarpc.replay").joinpath("page", name).read_text("utf-8")
        for name in ("report.css", "report.js")
    )
    beside = "" if inline else " 'self' file:"
    policy = (
        f"default-src 'none'; img-src data:{beside}; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    name = _text(facts["run"]["name"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{name}: samples beside their redrawing</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        f"{_head(facts)}{_overview(facts)}{_tools(facts)}{_steps(facts, pairs)}{_foot(facts, inline=inline)}"
        f"</main>\n{_DIALOG}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _head(facts: dict[str, Any]) -> str:
    summary = facts["summary"]
    calibration = facts["calibration"]
    kind = (
        "fine"
        if summary["drawn"] and not summary["below_min_psnr"]
        else "warning"
        if summary["drawn"]
        else "error"
    )
    lines = [
        f'<header>\n<p class="count">{_text(summary["line"])}</p>',
        f"<h1>{_text(facts['run']['name'])}<small>The samples that ai-toolkit drew while it trained, beside "
        "the same drawn again by chromarpc</small></h1>",
        f'<p class="banner {kind}">{_text(summary["verdict"])}</p>',
    ]
    if calibration is not None and calibration["matches"] is False:
        lines.append(f'<p class="banner error">{_text(calibration["sentence"])}</p>')
    return "\n".join(lines) + "\n</header>\n"


def _overview(facts: dict[str, Any]) -> str:
    summary = facts["summary"]
    tiles = [
        (f"{summary['drawn']}<small> / {summary['samples']}</small>", "samples drawn again"),
        (str(summary["identical"]), "identical, byte for byte"),
        (_db(summary["median_psnr_db"]), "median PSNR"),
        (_db(summary["lowest_psnr_db"]), "lowest PSNR"),
        ("–" if summary["median_ssim"] is None else f"{summary['median_ssim']:.3f}", "median SSIM"),
    ]
    shown = "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in tiles)
    return (
        f'<div class="tiles">{shown}</div>\n<div class="columns">\n<div class="panel"><h2>Similarity over the '
        f"training</h2>{curve_svg(facts['samples'], facts['curve'], summary['min_psnr_db'])}"
        '<p class="hint">Each point is a sample, the line is the median of a step. PSNR measures how alike two '
        "pictures are, both encoded as the trainer does: from 40 dB on hardly anybody sees a difference, at 30 dB "
        f"a careful look does. “Same” are equal pixels.</p></div>\n{_resolved(facts)}</div>\n"
    )


def _resolved(facts: dict[str, Any]) -> str:
    run, resolved, server = facts["run"], facts["resolved"], facts["server"]
    quantized = [
        what
        for what, on in (("transformer", resolved["quantize"]), ("text encoder", resolved["quantize_te"]))
        if on
    ]
    rows = {
        "Base model": f"{run['base_model']} (config)",
        "Drawn with": server["base_checkpoint"] or server["served_model"],
        "Model revision": server["model_revision"][:16],
        "Quantizer": f"{resolved['qtype']} of {' and '.join(quantized)}" if quantized else "none: weights merged",
        "Type": resolved["dtype"],
        "Noise draw": ", ".join(resolved["noise_draws"]),
        "LoKr": ", ".join(resolved["lokr_forms"]),
        "Network": run["network_type"],
        "Profile": server["profile"],
        "Drawn on": f"{server['device']}, chromarpc {server['version']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in sorted(server["versions"].items())),
        "Not replaced": ", ".join(f"${{{name}}}" for name in resolved["unresolved"]),
    }
    listed = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in rows.items() if value)
    return (
        f'<div class="panel"><h2>What was resolved and assumed</h2><dl class="facts">{listed}</dl>'
        f"{_list('Assumed', facts['assumptions'], opened=True)}"
        f"{_list('Files left out', [_ignored(one) for one in facts['ignored']])}</div>\n"
    )


def _ignored(one: Mapping[str, str]) -> str:
    return f"{one['file']}: {one['reason']}"


def _list(title: str, lines: Sequence[str], *, opened: bool = False) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines[:200])
    more = f"<li>… and {len(lines) - 200} more</li>" if len(lines) > 200 else ""
    start = "<details open>" if opened else "<details>"
    return f"{start}<summary>{title} ({len(lines)})</summary><ul>{items}{more}</ul></details>"


def _tools(facts: dict[str, Any]) -> str:
    kinds: dict[str, int] = {}
    for sample in facts["samples"]:
        kinds[_kind(sample)] = kinds.get(_kind(sample), 0) + 1
    names = {"identical": "identical", "alike": "alike", "below": "below the limit", "missing": "not drawn"}
    buttons = [f'<button type="button" data-filter="all" aria-pressed="true">all {len(facts["samples"])}</button>']
    buttons += [
        f'<button type="button" data-filter="{kind}" aria-pressed="false">{label} {kinds[kind]}</button>'
        for kind, label in names.items()
        if kind in kinds
    ]
    return f'<nav class="tools" aria-label="Which samples are shown">{"".join(buttons)}</nav>\n'


def _kind(sample: Mapping[str, Any]) -> str:
    if sample["psnr_db"] is None:
        return "missing"
    return "below" if sample["below_min_psnr"] else "identical" if sample["identical"] else "alike"


def _steps(facts: dict[str, Any], pairs: Sequence[_Pair]) -> str:
    together = list(zip(facts["samples"], pairs, strict=True))
    sections = []
    for step, found in groupby(together, key=lambda one: one[0]["step"]):
        group = list(found)
        first = group[0][0]
        about = first["checkpoint"] or ("no adapter yet" if step == 0 else "")
        if first["checkpoint_sha256"]:
            about += f" · sha256 {first['checkpoint_sha256'][:12]}"
        cards = "".join(_card(sample, pair) for sample, pair in group)
        sections.append(
            f'<section class="step"><h2>Step {step}<span>{_text(about)}</span></h2>'
            f'<div class="cards">{cards}</div></section>\n'
        )
    return "".join(sections)


def _card(sample: Mapping[str, Any], pair: _Pair) -> str:
    resolved = sample["resolved"] or {}
    title = f"Step {sample['step']}, sample {sample['index']}"
    theirs = (
        f"<figure>{_image(pair.theirs, f'{title}: the trainer')}<figcaption>the trainer’s</figcaption></figure>"
    )
    if pair.ours:
        theirs += (
            f"<figure>{_image(pair.ours, f'{title}: ours')}<figcaption>ours</figcaption></figure>"
            f"<figure>{_image(pair.difference, f'{title}: difference')}"
            f"<figcaption>difference × {DIFFERENCE_GAIN}</figcaption></figure>"
        )
        opening = f'<button type="button" class="open" aria-label="Compare {title}"></button>'
        data = f' data-theirs="{_text(pair.theirs_full)}" data-ours="{_text(pair.ours_full)}"'
    else:
        theirs += f'<figure class="wide"><div class="none">{_text(sample["reason"] or "not drawn")}</div></figure>'
        opening = data = ""
    return (
        f'<article class="card" id="s{sample["step"]}-{sample["index"]}" data-kind="{_kind(sample)}"'
        f' data-title="{title}" data-width="{int(resolved.get("width", 0))}"{data}>'
        f'<div class="three">{theirs}</div><div class="badges">{_badges(sample)}</div>'
        f'<p class="prompt">{_text(resolved.get("prompt", sample["file"]))}</p>'
        f'<p class="settings">{_text(_settings(resolved))}</p>{_warnings(sample)}{opening}</article>'
    )


def _badges(sample: Mapping[str, Any]) -> str:
    shown = [("", f"sample {sample['index']}")]
    kind = _kind(sample)
    if kind == "missing":
        shown.append(("warning", "not drawn"))
    elif sample["identical"]:
        shown.append(("fine", "identical"))
    elif sample["same_pixels"]:
        shown.append(("fine", "same pixels"))
    else:
        shown.append(("error" if kind == "below" else "", f"{sample['psnr_db']:.1f} dB"))
        shown.append(("", f"SSIM {sample['ssim']:.4f}"))
    return "".join(f'<span class="badge {kind}">{_text(text)}</span>' for kind, text in shown)


def _warnings(sample: Mapping[str, Any]) -> str:
    told = [warning for warning in sample["warnings"] if "floored" not in warning]  # the size is in the settings
    return "".join(f'<p class="settings warned">{_text(warning)}</p>' for warning in told)


def _settings(resolved: Mapping[str, Any]) -> str:
    if not resolved:
        return ""
    parts = [
        f"{resolved['width']}×{resolved['height']}",
        f"seed {resolved['seed']}",
        f"{resolved['steps']} steps",
        f"guidance {resolved['guidance_scale']:g}",
    ]
    if resolved["network_multiplier"] != 1:
        parts.append(f"multiplier {resolved['network_multiplier']:g}")
    if resolved["negative_prompt"]:
        parts.append(f"negative “{resolved['negative_prompt']}”")
    return " · ".join(parts)


def _image(source: str, description: str) -> str:
    if not source:
        return '<div class="none">not readable</div>'
    return f'<img loading="lazy" decoding="async" src="{source}" alt="{_text(description)}">'


def _foot(facts: dict[str, Any], *, inline: bool) -> str:
    beside = (
        "" if inline else f" The pictures in full size lie in the folder <code>{PICTURES}</code> beside this page."
    )
    return (
        "<footer><p>A saved adapter is rounded while the trainer drew with what it held, and GPU models round "
        "differently: only step 0, and runs whose files hold just what the trainer held, can be identical. "
        f"chromarpc {_text(facts['client_version'])} made this page; it loads nothing from anywhere.{beside}"
        "</p></footer>\n"
    )


def _db(value: float | None) -> str:
    return "–" if value is None else "same" if value >= 100 else f"{value:.1f}<small> dB</small>"


def _text(value: object) -> str:
    """Foreign text, safe in an element and in an attribute; marks that turn the writing direction are shown."""
    shown = "".join("\N{REPLACEMENT CHARACTER}" if c in _TURNING else c for c in f"{value}")
    return escape(shown, quote=True)


_TURNING: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\0")
_DIALOG: Final = """<dialog aria-label="Two pictures compared">
<div class="bar"><h3 class="title"></h3>
<button type="button" data-mode="slide" aria-pressed="true" title="s">slider</button>
<button type="button" data-mode="blink" aria-pressed="false" title="b">blink</button>
<button type="button" data-mode="sides" aria-pressed="false" title="v">side by side</button>
<button type="button" data-mode="difference" aria-pressed="false" title="d">difference</button>
<button type="button" class="before" aria-label="The sample before">←</button>
<button type="button" class="after" aria-label="The next sample">→</button>
<button type="button" class="close" aria-label="Close">✕</button></div>
<div class="stage" data-mode="slide" tabindex="0" autofocus><div class="pair">
<img class="theirs" alt="the trainer's"><img class="ours" alt="ours"><div class="edge"></div></div></div>
<div class="names"></div><input type="range" min="0" max="100" step="any" value="50">
<div class="badges"></div><p class="prompt"></p><p class="settings"></p>
<p class="hint">Keys: ← → other samples, s slider, b blink (space), v side by side, d difference, Esc closes.</p>
</dialog>"""
