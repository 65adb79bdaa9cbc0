"""Figures of a recorded run: `figure(run, "map.pdf")` is the heat map of one prompt, `kind="layers"` a metric by layer over all prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from patchscopes.core.errors import InputError, UnknownName, nearest
from patchscopes.views.by_layer import LOOK, planned_rows
from patchscopes.views.heatmap import heatmap, require_suffix
from patchscopes.views.lines import COLOURS, Line, lines

if TYPE_CHECKING:
    from patchscopes.runs.folder import Run

Kind = Literal["map", "layers"]
KINDS = ("map", "layers")


def figure(
    run: Run,
    path: str | Path,
    *,
    kind: Kind = "map",
    part: str | None = None,
    model: str | None = None,
    scope: str | None = None,
    metric: str | None = None,
    prompt: int = 0,
    position: int | None = None,
    target: int = 0,
    map: str | None = None,
    draw: int = 0,
) -> Path:
    """Draw a figure of `run` into `path`, a PNG, SVG or PDF by its suffix; the path.

    kind      "map": `Readings.grid` of one prompt; cells that failed or are not finished are hatched. "layers": the mean over prompts
              with the 95 % interval of a bootstrap over prompts, and the share of readings above their controls, a line for every
              part, model and scope that is left to choose from
    metric    a column of the readings; None: evidence over other sources if there is any, else the surprisal
    prompt … draw    which cells a map shows (see `Readings.grid`); not for layers

    InputError or UnknownName if there is no such thing in the run, or if a map could be of several.
    """
    require_suffix(path)
    if kind not in KINDS:
        raise UnknownName(f"unknown kind of figure {kind!r}. {nearest(kind, KINDS)}")
    chosen = {"part": part, "model": model, "scope": scope}
    readings = _chosen(planned_rows(run), chosen, one=kind == "map")
    metric = metric or default_metric(readings)
    if kind == "layers":
        return _layers(run, readings, path, metric)
    found = _as_readings(run, readings)
    grid = found.grid(metric, prompt=prompt, position=position, target=target, map=map, draw=draw)
    own = readings.filter((pl.col("prompt") == prompt) & (pl.col("target") == target) & (pl.col("draw") == draw))
    return heatmap(grid, path, title=_title(run, own, found.table.filter(pl.col("prompt") == prompt)))


def default_metric(readings: pl.DataFrame) -> str:
    """How much texts tell of their source; without controls, how they surprise the source model."""
    for name in ("bits_over_others", "surprisal"):
        if readings[name].is_not_null().any():
            return name
    return "logprob"


def _chosen(readings: pl.DataFrame, chosen: dict[str, str | None], *, one: bool) -> pl.DataFrame:
    """The readings of what was chosen; a name must be given only where what is left has several."""
    for name, value in chosen.items():
        known = readings[name].unique(maintain_order=True).to_list()
        if value is not None and value not in known:
            raise UnknownName(f"there is no {name} {value!r} here. {nearest(value, known)}")
        if value is not None:
            readings = readings.filter(pl.col(name) == value)
    for name in LOOK if one else ():
        if len(known := readings[name].unique(maintain_order=True).to_list()) > 1:
            raise InputError(f"this run has several {name}s; choose one of {', '.join(known)} (--{name})")
    return readings


def _as_readings(run: Run, readings: pl.DataFrame) -> Any:
    """Planned cells as a table of readings: what is not there has no numbers, and stays a cell."""
    from patchscopes.scopes.readings import SCHEMA, Readings

    texts = run.prompts.select("part", "model", "prompt", "prompt_text")
    table = readings.join(texts, on=["part", "model", "prompt"], how="left", maintain_order="left")
    table = table.with_columns(pl.lit("none").alias("control"), pl.col("text").fill_null(""))
    return Readings(table.select(list(SCHEMA)).cast(pl.Schema(SCHEMA)), {})


def _title(run: Run, readings: pl.DataFrame, table: pl.DataFrame) -> str:
    scopes = readings["scope"].unique().to_list()
    counts = dict(readings.filter(pl.col("status") != "ok").group_by("status").len().sort("status").iter_rows())
    hatched = ", ".join(f"{n:,} {status}" for status, n in counts.items())
    text = f"{table['prompt_text'][0]!r}, read through {scopes[0]} (run {run.id})" if len(table) else f"run {run.id}"
    return f"{text}; hatched: {hatched}" if hatched else text


def _layers(run: Run, readings: pl.DataFrame, path: str | Path, metric: str) -> Path:
    from patchscopes.scopes.readings import UNITS

    if metric not in UNITS:
        raise UnknownName(f"unknown metric {metric!r}. {nearest(metric, UNITS)}")
    looks = list(readings.group_by(LOOK, maintain_order=True))
    if len(looks) > len(COLOURS):
        raise InputError(
            f"this run has {len(looks)} combinations of part, model and scope; a figure shows at most {len(COLOURS)}. Choose with --part, "
            "--model and --scope"
        )
    names = [" · ".join(v for n, v in zip(LOOK, look, strict=True) if readings[n].n_unique() > 1) for look, _ in looks]
    some = [_line(name, own, metric) for name, (_, own) in zip(names, looks, strict=True)]
    left = readings.height - int(readings.filter(_measured(metric)).height)
    title = f"{run.name} (run {run.id}): mean over prompts, 95 % interval of a bootstrap over prompts"
    title += f"; {left:,} of {readings.height:,} readings have no value" if left else ""
    return lines(some, path, label=f"{metric.replace('_', ' ')} ({UNITS[metric]})", title=title)


def _measured(metric: str) -> pl.Expr:
    return (pl.col("status") == "ok") & pl.col(metric).is_finite().fill_null(False)


def _line(name: str, own: pl.DataFrame, metric: str) -> Line:
    judged = (pl.col("status") == "ok") & pl.col("verdict").is_in(["above", "same"])
    layers = sorted(own["source_layer"].unique())
    prompts = sorted(own["prompt"].unique())
    values = _square(own.filter(_measured(metric)), pl.col(metric), prompts, layers)
    return Line(
        name, layers, values, _square(own.filter(judged), (pl.col("verdict") == "above").cast(pl.Float64), prompts, layers)
    )


def _square(rows: pl.DataFrame, value: pl.Expr, prompts: list[int], layers: list[int]) -> Any:
    """[prompt, layer] of means; NaN where there is nothing."""
    import numpy as np

    found = np.full((len(prompts), len(layers)), np.nan)
    place, height = {p: k for k, p in enumerate(prompts)}, {layer: k for k, layer in enumerate(layers)}
    for p, layer, mean in rows.group_by("prompt", "source_layer").agg(value.mean().alias("mean")).iter_rows():
        found[place[p], height[layer]] = mean
    return found
