"""The page of a report: the parts put into the template, everything inline, and nothing that could call anywhere.

The page's policy allows its own script and style by their hashes and nothing else. What models and prompts say is escaped in the HTML
(see `markup`), and reaches the page's script only as compressed data, which it shows as text.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from patchscopes.core.files import make_folder, write_whole
from patchscopes.views.by_layer import by_layer, planned_rows
from patchscopes.views.report import made, summary
from patchscopes.views.report.embedded import embed
from patchscopes.views.report.markup import fill, shown
from patchscopes.views.report.scrub import scrub

if TYPE_CHECKING:
    from patchscopes.runs.folder import Run

LARGEST = 5_000_000  # bytes of a report
SCRIPTS = ("data", "colours", "grid", "paint", "card", "tables", "choose", "main")  # in this order
HERE = Path(__file__).parent


def report(run: Run, path: str | Path, *, title: str | None = None) -> Path:
    """Write the report of `run`, finished or not, to `path`: one HTML file under 5 MB; the path. InputError if it cannot be written."""
    path = Path(path)
    make_folder(path.parent)
    write_whole(path, page(run, title=title).encode("utf-8", "replace"))
    return path


def page(run: Run, *, title: str | None = None) -> str:
    """The same as text."""
    import html

    readings = planned_rows(run)
    controls = planned_rows(run, controls=True)
    layers = by_layer(readings)
    style = _asset("report.css")
    script = '"use strict";\n{\n' + "\n".join(_asset(f"{name}.js") for name in SCRIPTS) + "}\n"
    parts = {
        "policy": _policy(script, style),
        "title": html.escape(shown(scrub(title or run.name))),
        "style": style,
        "script": script,
        "header": summary.header(run, readings, title),
        "short": summary.short(layers, readings),
        "layers": summary.every_layer(layers),
        "failures": made.failures(readings, controls),
        "provenance": made.provenance(run),
        "prompts": made.prompts(run),
        "again": made.again(run),
        "cite": made.cite(run),
    }
    template = _asset("template.html")
    room = LARGEST - 20_000 - sum(len(part.encode("utf-8", "replace")) for part in (template, *parts.values()))
    embedded = embed(run, readings, controls, room)
    parts["caveats"] = made.caveats(run, embedded.left_out)
    parts["left_out"] = html.escape(" ".join(embedded.left_out))
    return fill(template, {**parts, "data": embedded.payload})


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _policy(script: str, style: str) -> str:
    allowed = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("script", script), ("style", style))
    }
    return (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; style-src 'sha256-{allowed['style']}'; connect-src 'none'; "
        "img-src 'none'; font-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'"
    )
