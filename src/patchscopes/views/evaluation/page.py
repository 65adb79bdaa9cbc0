"""An experiment as one HTML page: what may be said, the figures, the numbers behind them, how it was made. It opens offline, needs no
script, calls nowhere; what models say is text in it and nothing else (see `report.markup`)."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.core.files import make_folder, write_whole
from patchscopes.core.plain import plain
from patchscopes.evaluate.frame import Figure, Result, Table, provenance
from patchscopes.evaluate.statistics import Estimate
from patchscopes.views.evaluation.figures import draw
from patchscopes.views.report.markup import Markup, el, join, said, shown, table
from patchscopes.views.report.scrub import scrub

if TYPE_CHECKING:
    from collections.abc import Iterable

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
ROWS_SHOWN = 60  # of a table before it is folded away


def write(result: Result, path: str | Path) -> Path:
    """Write the page to `path`; the path."""
    path = Path(path)
    make_folder(path.parent)
    write_whole(path, page(result).encode("utf-8", "replace"))
    return path


def page(result: Result) -> str:
    """The page as text."""
    head = join(
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_policy()),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content="patchscopes"),
        el("title", f"{result.title} – patchscopes"),
        el("style", Markup(STYLE)),
    )
    body = join(
        el("p", "patchscopes evaluate ", result.name, cls="soft"),
        el("h1", result.title),
        el("p", result.paper, cls="soft"),
        _list("What may be said", result.claims, cls="claims"),
        _headline(result.headline),
        _list("What to know before it is believed", scrub(list(result.caveats))),
        _list("Where this differs from the paper", result.deviations),
        el("h2", "Figures") if result.figures else None,
        *(_figure(figure) for figure in result.figures),
        el("h2", "The numbers behind them") if result.tables else None,
        *(_table(one) for one in result.tables),
        el("h2", "How it was made"),
        _json("Settings", result.settings, open_=True),
        *(_json(f"Run {run.id}", provenance(run)) for run in result.runs),
        _json("All scores", result.to_json()["scores"]),
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _policy() -> str:
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    # SVG figures carry style attributes of their own, which hashes do not cover; no script, no address is allowed at all
    return f"default-src 'none'; style-src 'sha256-{style}' 'unsafe-hashes'; style-src-attr 'unsafe-inline'"


def _list(heading: str, lines: Iterable[str], cls: str | None = None) -> Markup | None:
    lines = list(lines)
    return join(el("h2", heading), el("ul", *(el("li", line) for line in lines), cls=cls)) if lines else None


def _headline(figures: Mapping[str, Any]) -> Markup | None:
    rows = [(name, value_text(value), _of(value)) for name, value in figures.items()]
    return table(("figure", "value (95 % interval)", "of"), rows, caption="In short", numbers=(1, 2)) if rows else None


def value_text(value: Any, *, share: bool = True) -> str:
    """A figure for people: an estimate with its interval, a share as per cent, anything else as it is."""
    if isinstance(value, Estimate):
        one = (lambda x: f"{x:.1%}") if share else (lambda x: f"{x:.3g}")
        between = "interval unknown" if math.isnan(value.low) else f"{one(value.low)} to {one(value.high)}"
        return "none" if math.isnan(value.value) else f"{one(value.value)} ({between})"
    if isinstance(value, float):
        return "none" if math.isnan(value) else f"{value:.1%}" if share else f"{value:.3g}"
    return str(value)


def _of(value: Any) -> str:
    return f"{value.n:,} rows, {value.clusters:,} entities" if isinstance(value, Estimate) else ""


def _figure(figure: Figure) -> Markup:
    with tempfile.TemporaryDirectory() as folder:
        text = draw(figure, Path(folder) / "figure.svg").read_text(encoding="utf-8")
    # comments repeat the texts that are drawn
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{_slug(figure.name)}-", svg)
    return el("figure", Markup(svg), el("figcaption", figure.title), role="group", aria_label=figure.title)


def _slug(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "-", name)


def _table(one: Table) -> Markup:
    numbers = tuple(k for k in range(len(one.columns)) if any(isinstance(row[k], (int, float, Estimate)) for row in one.rows))
    rows = [
        [
            said(value) if isinstance(value, str) else "" if value is None else value_text(value, share=name in one.shares)
            for name, value in zip(one.columns, row, strict=True)
        ]
        for row in one.rows
    ]
    body = table(one.columns, rows, caption=one.caption, numbers=numbers)
    if len(rows) <= ROWS_SHOWN:
        return body
    return el("details", el("summary", f"{one.caption} ({len(rows):,} rows)"), body)


def _json(heading: str, document: Any, *, open_: bool = False) -> Markup:
    text = json.dumps(plain(scrub(document)), indent=1, ensure_ascii=False, default=str)
    return el("details", el("summary", heading), el("pre", shown(text)), open="" if open_ else None)
