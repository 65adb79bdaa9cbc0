"""Readings as a table for a terminal or a notebook: every reading beside what its controls say."""

from __future__ import annotations

import html
from typing import Any

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text

from patchscopes.model.tokens import visible

SHOWN = 200  # readings at most
WORDS = 70  # characters of a text
ROOMY = 100  # columns of a terminal from which on the table has lines and the surprisal
MARK = {"above": "above", "same": "same", "not run": "not run"}
STYLE = {"above": "bold green", "same": "dim", "not run": "yellow"}

NAMES = {  # of controls; those that a user named are shown as they are called
    "nothing": "nothing patched in",
    "zero": "a vector of zeros",
    "map_of_zero": "what the map makes of zero",
    "random": "a random vector",
    "random_covariance": "a random vector that lies as states do",
    "other": "another source",
    "mean": "the mean vector",
    "context": "the same words in another context",
    "text": "the words alone",
    "text_at_position": "the words read alone",
}


def _columns(readings: pl.DataFrame) -> list[tuple[str, str]]:
    """(column of the table, heading) of what differs between cells, then the numbers."""
    keys = [
        ("prompt_text", "prompt"),
        ("position", "i"),
        ("token", "token"),
        ("source_layer", "ℓ"),
        ("target", "T"),
        ("target_layer", "ℓ*"),
        ("map", "map"),
        ("draw", "draw"),
    ]
    varying = [(c, h) for c, h in keys if c == "source_layer" or readings[c].n_unique() > 1]
    if readings.select("prompt", "token").n_unique() == readings.select("prompt", "position").n_unique():
        varying = [(c, h) for c, h in varying if c != "position"]  # the token alone says where
    if readings["target_layer"].equals(readings["source_layer"]):
        varying = [(c, h) for c, h in varying if c != "target_layer"]
    return varying


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None or value != value else f"{round(value, digits) + 0.0:+.{digits}f}"


def _plain(value: float | None, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _short(text: str | None) -> str:
    shown = visible((text or "").strip(" ")).replace("␣", " ")
    return shown if len(shown) <= WORDS else shown[: WORDS - 1] + "…"


def rows(table: pl.DataFrame) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, cells and verdicts of the readings in a table, at most `SHOWN`."""
    readings = table.filter(pl.col("control") == "none")
    columns = _columns(readings)
    evidence = readings["verdict"].ne("not run").any()
    headings = [h for _, h in columns] + ["says", "surprisal"]
    if evidence:
        headings += ["nothing", "random", "others", "text", "p"]
    headings.append("verdict")
    cells, verdicts = [], []
    for row in readings.head(SHOWN).iter_rows(named=True):
        cell = [str(row[c]) if c not in ("token", "prompt_text") else _short(row[c]) for c, _ in columns]
        surprisal = _plain(row["surprisal"], 1)
        cell += [_short(row["text"]) or "(nothing)", surprisal]
        if evidence:
            cell += [_number(row[f"bits_over_{k}"]) for k in ("nothing", "random", "others", "text")]
            cell.append(_plain(row["p_value"], 2))
        cells.append([*cell, MARK[row["verdict"]]])
        verdicts.append(row["verdict"])
    return headings, cells, verdicts


def controls(table: pl.DataFrame) -> list[tuple[str, str]]:
    """(control, the text it brought forth most) for each kind of control in the table."""
    kinds = [kind for kind in table["control"].unique(maintain_order=True) if kind != "none"]
    found = []
    known = list(NAMES)
    for kind in sorted(kinds, key=lambda kind: known.index(kind) if kind in known else len(known)):
        name = NAMES.get(kind, str(kind))
        texts = table.filter(pl.col("control") == kind)["text"]
        if len(texts):
            top = texts.value_counts(sort=True, name="n").row(0, named=True)
            share = f" ({top['n']} of {len(texts)})" if texts.n_unique() > 1 else ""
            found.append((name + share, _short(top["text"]) or "(nothing)"))
    return found


def _title(provenance: dict[str, Any]) -> str:
    scope = provenance.get("scope", {})
    return f"{scope.get('name', 'patchscope')}: {_short((scope.get('targets') or [{}])[0].get('text', ''))}"


def _caption(table: pl.DataFrame) -> str:
    n = table.filter(pl.col("control") == "none").height
    more = f"  (the first {SHOWN} of {n} readings; all are in .table)" if n > SHOWN else ""
    lines = [f"{name}: {text}" for name, text in controls(table)]
    if not lines:
        return "controls: not run" + more
    bits = "nothing, random, others, text: bits by which the words are likelier with this state than with that in its place"
    return "\n".join([bits, "What the same scope says without this state:", *lines]) + more


def as_rich(table: pl.DataFrame, provenance: dict[str, Any], *, width: int = ROOMY) -> Table:
    """A rich table; bits are evidence over each control. `width`: characters to fit in; what it leaves out is in .table."""
    headings, cells, verdicts = rows(table)
    narrow = width < ROOMY
    needs = [min(12, max(map(len, column))) for column in zip(headings, *cells, strict=True)]
    kept = list(range(len(headings)))
    for heading in ("surprisal", "text", "nothing", "random", "others", "p"):  # the first to go first; words and verdicts never
        if narrow and sum(needs[k] + 3 for k in kept) + 1 > width:
            kept = [k for k in kept if headings[k] != heading]
    headings, needs = [headings[k] for k in kept], [needs[k] for k in kept]
    cells = [[cell[k] for k in kept] for cell in cells]
    shown = Table(
        title=Text(_title(provenance)),
        caption=Text(_caption(table)),
        caption_justify="left",
        title_justify="left",
        box=box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD,
        pad_edge=not narrow,
    )
    for heading, least in zip(headings, needs, strict=True):
        numeric = heading in ("i", "ℓ", "ℓ*", "T", "draw", "surprisal", "nothing", "random", "others", "text", "p")
        fixed = numeric or heading == "verdict"
        shown.add_column(heading, justify="right" if numeric else "left", overflow="fold", no_wrap=fixed, min_width=least)
    for cell, verdict in zip(cells, verdicts, strict=True):
        shown.add_row(*(Text(c) for c in cell[:-1]), Text(cell[-1], style=STYLE[verdict]))
    return shown


def as_html(table: pl.DataFrame, provenance: dict[str, Any]) -> str:
    """The same as HTML, with everything that a model said escaped."""
    headings, cells, _ = rows(table)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cell) + "</tr>" for cell in cells)
    caption = html.escape(_caption(table)).replace("\n", "<br>")
    title = html.escape(_title(provenance))
    return f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{caption}</p>"
