"""A grid of readings as a heat map in a file: colour is the metric, words are what the scope said.

Signed metrics (evidence in bits) get a diverging map with white at zero, all others a sequential one; cells without a reading are
hatched. Row 0 is at the bottom, so that up is deeper in the model.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.core.errors import InputError

if TYPE_CHECKING:
    from patchscopes.scopes import Grid

SUFFIXES = (".png", ".svg", ".pdf")
WIDEST, HIGHEST = 14.0, 9.0  # inches that the cells may take
CELL = (0.95, 0.42)  # inches of a cell where there is room
NARROWEST, LONGEST = 0.05, 60.0  # inches: no cell is narrower, unless all would be longer
CHARACTER = 0.068  # inches that a character of a cell's words takes
LABEL = 0.16  # inches that an axis label needs


def require_suffix(path: str | Path) -> None:
    """InputError if a figure cannot be written as `path` says."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{str(path)!r} has the suffix {suffix!r}; a figure is written as {', '.join(SUFFIXES)}")


def heatmap(grid: Grid, path: str | Path, *, title: str = "") -> Path:
    """Draw `grid` into `path`, a PNG, SVG or PDF by its suffix (else InputError); the path. `title`: what was read."""
    require_suffix(path)
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_rows, n_columns = grid.values.shape
    width = max(min(CELL[0], WIDEST / n_columns), min(NARROWEST, LONGEST / n_columns))
    height = max(min(CELL[1], HIGHEST / n_rows), min(NARROWEST, LONGEST / n_rows))
    figure = Figure(figsize=(max(width * n_columns, 2.5) + 1.9, height * n_rows + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norm, colours = _scale(grid)
    axes.patch.set(facecolor="white", edgecolor="0.75", hatch="////")  # seen where there is no reading
    image = axes.imshow(
        np.ma.masked_invalid(grid.values), cmap=colours, norm=norm, aspect="auto", origin="lower", interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label=f"{grid.metric.replace('_', ' ')} ({grid.units})", pad=0.02)
    axes.set_xlabel(grid.column_name)
    axes.set_ylabel(grid.row_name)
    turned = max(map(len, grid.columns)) * CHARACTER > width
    _label(axes.xaxis, grid.columns, every=_step(n_columns, width), rotation=90 if turned else 0)
    _label(axes.yaxis, grid.rows, every=_step(n_rows, height), rotation=0)
    if width >= 4 * CHARACTER and height >= LABEL:
        _write_words(axes, grid, image, room=int(width / CHARACTER))
    if title:
        axes.set_title(_wrapped(title, figure.get_figwidth()), fontsize=9, loc="left", parse_math=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font then draws a box, which says as much
        figure.savefig(path, dpi=150)
    return path


def _scale(grid: Grid) -> tuple[Any, str]:
    """(norm, name of the colour map) of the grid's metric."""
    import numpy as np
    from matplotlib.colors import Normalize

    some = grid.values[np.isfinite(grid.values)]
    if grid.metric.startswith("bits_over_"):
        most = max(float(np.abs(some).max()), 1e-9) if some.size else 1.0
        return Normalize(-most, most), "PuOr_r"
    return Normalize(*((float(some.min()), float(some.max())) if some.size else (0.0, 1.0))), "viridis"


def _step(count: int, size: float) -> int:
    """Every how many-th label has room."""
    return next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step * size >= LABEL), count)


def _label(axis: Any, labels: tuple[str, ...], *, every: int, rotation: int) -> None:
    from patchscopes.model.tokens import visible

    ticks = range(0, len(labels), every)
    parts = [labels[k].partition(": ") for k in ticks]  # "4: France" of a position: its spaces count, the one between does not
    shown = [f"{name} {visible(_short(token, 24))}".strip() for name, _, token in parts]
    axis.set_ticks(ticks, shown, fontsize=8, rotation=rotation, parse_math=False)


def _write_words(axes: Any, grid: Grid, image: Any, *, room: int) -> None:
    import numpy as np

    from patchscopes.model.tokens import visible

    for r, row in enumerate(grid.texts):
        for c, text in enumerate(row):
            if not np.isfinite(grid.values[r, c]):
                continue
            red, green, blue, _ = image.cmap(image.norm(grid.values[r, c]))
            ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.46 else "white"
            words = visible(_short(text.strip(), room)).replace("␣", " ")
            axes.text(c, r, words, ha="center", va="center", fontsize=7, color=ink, parse_math=False, in_layout=False)


def _short(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def _wrapped(title: str, inches: float) -> str:
    import textwrap

    from patchscopes.model.tokens import visible

    shown = visible(title).replace("␣", " ")
    return "\n".join(textwrap.wrap(_short(shown, 300), max(20, int(inches / 0.085))))
