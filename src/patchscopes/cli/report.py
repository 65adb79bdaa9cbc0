"""`patchscopes report` and `patchscopes figure`: a recorded run as one HTML file, and as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.options import Json
from patchscopes.cli.sweep import RunsFolder, WhichRun
from patchscopes.cli.terminal import amount, print_json, say, waiting
from patchscopes.core.files import told

if TYPE_CHECKING:
    import polars as pl

    from patchscopes.runs import Run


def report(
    run: WhichRun,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file. Default: report.html in the run folder.", show_default=False),
    ] = None,
    runs: RunsFolder = Path("runs"),
    title: Annotated[str | None, typer.Option(help="Default: the experiment's name.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Write a run as one HTML file under 5 MB that opens anywhere, offline.

    It holds the map and table of its readings beside their controls, which layers may be interpreted, how it was made and whom to
    cite. The run need not be finished.
    """
    from patchscopes.runs import open_run
    from patchscopes.views.by_layer import by_layer, planned_rows
    from patchscopes.views.report import report as write

    found = open_run(run, runs=runs)
    path = output or _beside(found)
    with waiting("writing the report"):
        write(found, path, title=title)
    layers = by_layer(planned_rows(found))
    size = path.stat().st_size
    if json:
        rows = layers.to_dicts()
        print_json({"report": str(path), "bytes": size, "status": found.status, "counts": found.counts, "layers": rows})
        return
    _say_layers(found, layers)
    say(f"{amount(size)}; opens in any browser, offline")
    print(path)


def figure(
    run: WhichRun,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The figure: .png, .svg or .pdf.", show_default=False)],
    kind: Annotated[
        str, typer.Option(help="map: one prompt, cell by cell. layers: a metric by layer, over all prompts, with 95 % intervals.")
    ] = "map",
    part: Annotated[str | None, typer.Option(help="A part of the experiment.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="One of the run's models.", show_default=False)] = None,
    scope: Annotated[str | None, typer.Option(help="One of the run's scopes.", show_default=False)] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="bits_over_others, bits_over_nothing, bits_over_random, bits_over_text, surprisal, logprob, norm_ratio, p_value. "
            "Default: bits_over_others, without controls surprisal.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=0, help="The prompt of a map, by its number.")] = 0,
    position: Annotated[
        int | None, typer.Option(help="The position of a map of target layers, if there are several.", show_default=False)
    ] = None,
    runs: RunsFolder = Path("runs"),
) -> None:
    """Draw a run: the map of one prompt, or a metric by layer over all prompts.

    \b
    patchscopes figure 7f3c map.pdf --scope describe --prompt 2
    patchscopes figure 7f3c layers.pdf --kind layers
    """
    from patchscopes.views.figure import figure as draw
    from patchscopes.views.heatmap import require_suffix

    require_suffix(file)
    from patchscopes.runs import open_run

    found = open_run(run, runs=runs)
    options: dict[str, Any] = {"part": part, "model": model, "scope": scope, "metric": metric, "prompt": prompt}
    with told(file):
        draw(found, file, kind=kind, position=position, **options)  # type: ignore[arg-type]  # told if it is none
    print(file)


def _beside(run: Run) -> Path:
    """In the run folder; if nothing can be written there, here."""
    if os.access(run.path, os.W_OK):
        return run.path / "report.html"
    say(f"{str(run.path)!r} cannot be written to; the report is written here")
    return Path(f"{run.path.name}-report.html")


def _say_layers(run: Run, layers: pl.DataFrame) -> None:
    """A line for every part, model and scope, and one if the run is not finished."""
    from patchscopes.views.by_layer import in_short, spans

    for view in in_short(layers):
        yes = spans(view.layers.get("yes", [])) or "none"
        say(f"{view.name}: {view.above:,} of {view.judged:,} readings above their controls; layers to interpret: {yes}")
    if waiting := run.counts["waiting"]:
        say(f"not finished: {waiting:,} of {run.cells:,} cells are waiting")
