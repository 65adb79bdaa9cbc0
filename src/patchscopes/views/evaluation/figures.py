"""Figures of experiments as in the papers: lines by layer with intervals, bars by relation, heat maps of source × target layer.

They are drawn from plain data (`evaluate.frame.Lines`, `Bars`, `Heat`), the same for PNG, SVG, PDF and the page.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.core.files import make_folder
from patchscopes.evaluate.frame import Bars, Figure, Heat, Lines
from patchscopes.views.heatmap import require_suffix
from patchscopes.views.lines import COLOURS, MARKERS

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS = ("png", "svg")
SALT = "patchscopes"  # of the ids in an SVG, so that equal figures are equal files


def save_figures(figures: Iterable[Figure], folder: str | Path) -> list[Path]:
    """Every figure as NAME.png and NAME.svg in `folder`; the paths."""
    folder = make_folder(Path(folder))
    return [draw(figure, folder / f"{figure.name}.{kind}") for figure in figures for kind in KINDS]


def draw(figure: Figure, path: str | Path) -> Path:
    """Draw into `path`, a PNG, SVG or PDF by its suffix (else InputError); the path."""
    require_suffix(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=_size(figure), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    {Lines: _lines, Bars: _bars, Heat: _heat}[type(figure)](axes, figure)
    axes.set_title(_escaped(figure.title), fontsize=9, loc="left", parse_math=False, wrap=True)
    path = Path(path)
    make_folder(path.parent)
    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "path"}):
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font then draws a box, which says as much
        canvas.savefig(path, dpi=150, metadata=date)
    return path


def _size(figure: Figure) -> tuple[float, float]:
    if isinstance(figure, Bars):
        return 7.6, max(2.2, 0.2 * len(figure.labels) * max(1, len(figure.series)) * 0.6 + 1.3)
    if isinstance(figure, Heat):
        return min(9.0, 2.6 + 0.42 * len(figure.columns)), min(8.0, 1.6 + 0.34 * len(figure.rows))
    return 7.6, 4.2


def _lines(axes: Any, figure: Lines) -> None:
    for k, line in enumerate(figure.lines):
        colour = COLOURS[k % len(COLOURS)]
        style = "--" if line.dashed else "-"
        axes.plot(
            line.x,
            line.y,
            style,
            color=colour,
            marker=MARKERS[k % len(MARKERS)],
            markersize=4,
            linewidth=1.4,
            label=_escaped(line.name),
        )
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(_escaped(figure.x_label))
    axes.set_ylabel(_escaped(figure.y_label))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if figure.y_range is not None:
        axes.set_ylim(*figure.y_range)
    _plain(axes, "y")
    if len(figure.lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def _bars(axes: Any, figure: Bars) -> None:
    height = 0.8 / max(1, len(figure.series))
    for k, (name, estimates) in enumerate(figure.series):
        for row, one in enumerate(estimates):
            if one is None or math.isnan(one.value):
                continue
            y = row + (k - (len(figure.series) - 1) / 2) * height
            label = _escaped(name) if row == next(i for i, e in enumerate(estimates) if e is not None) else None
            axes.barh(y, one.value, height * 0.92, color=COLOURS[k % len(COLOURS)], label=label)
            if one.low == one.low:
                axes.hlines(y, one.low, one.high, color="0.25", linewidth=1)
    axes.set_yticks(range(len(figure.labels)), [_escaped(label) for label in figure.labels], fontsize=7.5, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(_escaped(figure.y_label))
    _plain(axes, "x")
    if len(figure.series) > 1:
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.04), ncols=4)


def _heat(axes: Any, figure: Heat) -> None:
    import numpy as np

    values = np.ma.masked_invalid(np.array(figure.values, float))
    axes.patch.set(facecolor="white", edgecolor="0.75", hatch="////")  # seen where there is nothing
    # vectors, not an image inside the picture: the page's policy shows none
    edges = [np.arange(n + 1) - 0.5 for n in values.shape]
    image = axes.pcolormesh(edges[1], edges[0], values, cmap="viridis", vmin=0, linewidth=0.2, edgecolors="face")
    bar = axes.figure.colorbar(image, ax=axes, label=_escaped(figure.label), pad=0.02)
    bar.solids.set(rasterized=False, edgecolor="face")
    for axis, labels in ((axes.yaxis, figure.rows), (axes.xaxis, figure.columns)):
        ticks = range(0, len(labels), max(1, math.ceil(len(labels) / 20)))
        axis.set_ticks(ticks, [_escaped(labels[k]) for k in ticks], fontsize=8, parse_math=False)
    axes.set_xlabel(_escaped(figure.column_label))
    axes.set_ylabel(_escaped(figure.row_label))
    if values.size <= 150:
        for r, row in enumerate(figure.values):
            for c, value in enumerate(row):
                if not math.isnan(value):
                    dark = image.norm(value) < 0.55
                    axes.text(c, r, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    if figure.marked is not None:
        from matplotlib.patches import Rectangle

        r, c = figure.marked
        axes.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, fill=False, edgecolor="#d55e00", linewidth=2.2))


def _plain(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.92")
    axes.set_axisbelow(True)


def _escaped(text: str) -> str:
    """No formula, no control characters."""
    from patchscopes.model.tokens import visible

    return " ".join(visible(word) for word in text.split(" ")).replace("$", r"\$")
