"""The parts of a report that cover everything: what was asked, what became of it, and what every layer says against chance."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import polars as pl

from patchscopes.controls.evidence import SIGNIFICANT
from patchscopes.core.names import USUAL_CONTROLS
from patchscopes.views.by_layer import in_short, spans
from patchscopes.views.report.markup import Markup, el, join, said, table
from patchscopes.views.report.scrub import scrub

if TYPE_CHECKING:
    from patchscopes.runs.folder import Run

WORD = {
    "yes": "more than chance",
    "no": "chance is not excluded",
    "too few prompts": "too few prompts to say",
    "not run": "controls not run",
    "no readings": "no readings yet",
}
VIEWS, LAYERS = 200, 1500  # rows of tables at most
MARK = {"yes": "▲", "no": "–", "too few prompts": "?", "not run": "×", "no readings": "…"}
NEXT = {
    "planned": "It was planned and has not begun.",
    "running": "It is running now.",
    "stopped": "It was stopped.",
    "partial": "Some of its cells failed.",
    "failed": "It failed.",
}


def header(run: Run, readings: pl.DataFrame, title: str | None) -> Markup:
    """Title, what was asked, status, counts, and a banner if not everything is there."""
    looks = run.record["looks"]
    date = datetime.fromisoformat(run.record["created"]).strftime("%-d %B %Y, %H:%M UTC")
    models = _several([_models(look) for look in looks])
    scopes = [el("li", el("b", scrub(name)), text) for name, text in dict.fromkeys(_scope(look) for look in looks)]
    prompts = run.prompts.select("part", "prompt").unique().height
    layers = sorted(readings["source_layer"].unique().to_list())
    counts = run.counts
    facts = [
        ("models", models),
        ("scopes", el("ul", *scopes)),
        ("prompts", _prompts(run, prompts)),
        ("layers read", spans(layers) or "none"),
        ("controls", _controls(looks)),
        ("cells", _cells(run, readings)),
    ]
    chips = [
        el("li", el("b", f"{counts[key]:,}"), f" {key}", cls=f"chip {key}" + (" none" if not counts[key] else ""))
        for key in counts
    ]
    return el(
        "header",
        el("p", "patchscopes report", cls="kicker"),
        el("h1", said(scrub(title or run.name))),
        el("p", f"Run {run.id} · {date} · ", el("b", run.status, cls=f"status {run.status}"), cls="byline"),
        banner(run),
        el("ul", *chips, cls="chips", aria_label="Cells by what became of them"),
        el("dl", *(join(el("dt", name), el("dd", value)) for name, value in facts), cls="facts"),
    )


def banner(run: Run) -> Markup | None:
    """What is not there, in plain words; nothing if all is."""
    counts, name = run.counts, scrub(run.path.name)
    if counts["waiting"]:
        share = f"{counts['waiting']:,} of {run.cells:,} cells are waiting. "
        told = f"This run is not finished. {NEXT.get(run.status, '')} {share}Everything below covers the finished cells only."
        return el("p", told, " ", el("code", f"patchscopes resume {name}"), " goes on.", cls="banner", role="note")
    if counts["failed"]:
        told = f"{counts['failed']:,} cells failed; they are listed below. "
        return el("p", told, el("code", f"patchscopes retry {name}"), " tries them again.", cls="banner", role="note")
    return None


def _models(look: dict[str, Any]) -> str:
    source, target = scrub(look["model"]), scrub(look.get("target_model") or look["model"])
    return source if source == target else f"{source} → {target}"


def _several(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _scope(look: dict[str, Any]) -> tuple[str, str]:
    targets = look.get("provenance", {}).get("scope", {}).get("targets", [])
    texts = [target["text"] for target in targets[:5] if target["text"] != "x"]  # the placeholder alone says nothing
    return look["scope"], "".join(f": “{text}”" if not k else f" · “{text}”" for k, text in enumerate(texts))


def _prompts(run: Run, count: int) -> Markup:
    some = run.prompts["prompt_text"].unique(maintain_order=True).head(3).to_list()
    examples = [join(" · " if k else "", said(text[:80] + ("…" if len(text) > 80 else ""))) for k, text in enumerate(some)]
    return join(f"{count:,}: ", *examples, " …" if count > len(some) else "")


def _controls(looks: list[dict[str, Any]]) -> str:
    with_controls = [look for look in looks if look.get("controls")]
    if not with_controls:
        return "not run: nothing here can be told from what the scope would say anyway"
    named = dict.fromkeys(kind for look in with_controls for kind in _named(look["controls"]))
    *first, last = named
    found = f"{', '.join(first)} and {last} beside every reading" if first else f"{last} beside every reading"
    return found if len(with_controls) == len(looks) else f"{found} of {len(with_controls)} of {len(looks)} views"


def _named(controls: bool | list[str]) -> list[str]:
    return list(USUAL_CONTROLS) if controls is True else list(controls or ())


def _cells(run: Run, readings: pl.DataFrame) -> str:
    return f"{run.cells:,}: {readings.height:,} readings and {run.cells - readings.height:,} controls"


# ------------------------------------------------------------------------------------------------------------- by layer


def short(layers: pl.DataFrame, readings: pl.DataFrame) -> Markup:
    """A line for every view: how many readings are above their controls, how many chance would give, which layers may be interpreted."""
    rows: list[list[object]] = []
    views = in_short(layers)
    for view in views[:VIEWS]:
        yes = spans(view.layers.get("yes", []))
        no = "; ".join(f"{spans(numbers)} ({WORD[why]})" for why, numbers in view.layers.items() if why != "yes")
        rows.append(
            [
                scrub(view.name),
                f"{view.above:,} of {view.judged:,}" if view.judged else "not run",
                f"≤ {SIGNIFICANT * view.judged:,.1f}" if view.judged else "",
                _skyline(view.table),
                el("span", yes, cls="yes") if yes else "none",
                no or "none",
            ]
        )
    headings = [
        "view",
        "readings above controls",
        "by chance",
        "share above, by layer",
        "layers to interpret",
        "not to interpret",
    ]
    return join(
        table(headings, rows, caption="Readings above their controls, in every view", numbers=(1, 2)),
        _more(len(views) - VIEWS, "views"),
        el("p", *_many(readings, layers)),
    )


def _many(readings: pl.DataFrame, layers: pl.DataFrame) -> list[object]:
    """What has to be kept in mind where many cells were tried."""
    judged = readings.filter((pl.col("status") == "ok") & pl.col("verdict").is_in(["above", "same"]))
    if judged.is_empty():
        return ["No reading has a verdict: controls were not run, or nothing is finished. ", _not_true()]
    least = float(judged["p_value"].min())  # type: ignore[arg-type]
    tests = layers.filter(pl.col("prompts") > 0).height
    return [
        f"{judged.height:,} readings were compared with their controls. Where a text tells nothing of its source, up to one reading "
        f"in twenty is above all the same, so up to {SIGNIFICANT * judged.height:,.1f} of these. The smallest p-value here is "
        f"{least:.2g}: the best of {judged.height:,} cells proves nothing by itself. A layer is to be interpreted if chance would not "
        f"have given as many readings above, corrected for the {tests:,} layers looked at, each prompt counted once. ",
        _not_true(),
    ]


def _not_true() -> Markup:
    return el(
        "strong",
        "Consistent is not true: above means that a text tells of the state it came from, not that what it says is right.",
    )


def every_layer(layers: pl.DataFrame) -> Markup:
    """A table for every view, a row a layer."""
    views = in_short(layers)
    kept = max(1, min(len(views), LAYERS * len(views) // max(layers.height, 1)))
    tables = [_layers(scrub(view.name), view.table.head(LAYERS)) for view in views[:kept]]
    if len(views) == 1:
        return join(*tables, _more(layers.height - LAYERS, "layers"))
    folded = [
        el("details", el("summary", scrub(view.name)), whole, open=None if k else "")
        for k, (view, whole) in enumerate(zip(views, tables, strict=False))
    ]
    return join(*folded, _more(len(views) - kept, "views"))


def _more(n: int, what: str) -> Markup | None:
    """That there are more than have room."""
    return (
        el("p", f"{n:,} more {what} have no room here; `patchscopes report --json` prints all.", cls="left-out")
        if n > 0
        else None
    )


def _layers(name: str, own: pl.DataFrame) -> Markup:
    left = [key for key in ("failed", "skipped", "waiting") if own[key].sum()]
    headings = ["layer ℓ", "readings", "above", "same", "not run", *left, "prompts", "share above", "", "chance", "the layer"]
    rows: list[list[object]] = []
    for row in own.sort("source_layer").iter_rows(named=True):
        share, chance, word = row["share"], row["chance"], row["interpret"]
        counts = [f"{row[key]:,}" for key in ("readings", "above", "same", "not_run", *left, "prompts")]
        shares = ["", "", ""] if share is None else [f"{share:.0%}", _bar(share), _small(chance)]
        told = el("span", f"{MARK[word]} {WORD[word]}", cls="yes" if word == "yes" else "no")
        rows.append([row["source_layer"], *counts, *shares, told])
    numbers = tuple(k for k, heading in enumerate(headings) if heading not in ("", "the layer"))
    return table(headings, rows, caption=f"{name}: every source layer", numbers=numbers)


def _bar(share: float) -> Markup:
    track, value = el("rect", cls="track", width=100, height=8), el("rect", cls="value", width=f"{100 * share:.1f}", height=8)
    return el("svg", track, value, cls="bar", viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true")


def _skyline(own: pl.DataFrame) -> Markup:
    """A bar for every layer, as high as its share; full where the layer may be interpreted."""
    step, high = 10, 30
    paths = {"value": "", "weak": ""}
    for k, row in enumerate(own.sort("source_layer").iter_rows(named=True)):
        size = round(high * (row["share"] or 0), 1)
        paths["value" if row["interpret"] == "yes" else "weak"] += f"M{k * step} {high}v-{size:g}h{step - 2}v{size:g}z"
    width = step * own.height
    whole = [el("rect", cls="track", width=width, height=high), *(el("path", cls=kind, d=d) for kind, d in paths.items() if d)]
    box = {"viewBox": f"0 0 {width} {high}", "width": min(width, 400), "height": high}
    return el("svg", *whole, cls="skyline", **box, preserveAspectRatio="none", aria_hidden="true")


def _small(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"
