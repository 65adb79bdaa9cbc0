"""A grid of readings for a terminal: the words of every cell, brighter where the metric is higher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from patchscopes.scopes import Grid

LOW, HIGH = (68, 1, 84), (253, 231, 37)  # the ends of viridis
MIDDLE = (33, 145, 140)
NARROWEST = 3  # characters of a cell, if there is more to say


@dataclass(frozen=True)
class WordMap:
    """Print it with rich. Row 0 is at the bottom, so that up is deeper in the model; · is a cell without a reading."""

    grid: Grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = self.grid
        labels = max(len(row) for row in grid.rows)
        longest = max((len(_shown(text)) for texts in (grid.columns, *grid.texts) for text in texts), default=1)
        room = min(longest, (options.max_width - labels - 3) // len(grid.columns) - 1)
        yield Text(
            f"{grid.row_name} (up) × {grid.column_name} (right); colour: {grid.metric.replace('_', ' ')}, {grid.units}",
            style="bold",
        )
        if room < min(longest, NARROWEST):
            yield Text(
                f"{len(grid.columns)} columns do not fit into {options.max_width} characters: draw it with --figure map.png"
            )
            return
        table = Table.grid(padding=(0, 1, 0, 0))
        for row in reversed(range(len(grid.rows))):
            cells = [
                _cell(text, float(value), self._share(float(value)), room)
                for text, value in zip(grid.texts[row], grid.values[row], strict=True)
            ]
            table.add_row(Text(grid.rows[row].rjust(labels) + " │", style="bold"), *cells)
        table.add_row(Text(" " * labels + " └", style="bold"), *(Text(_fit(c, room), style="bold") for c in grid.columns))
        yield table

    def _share(self, value: float) -> float:
        """Where the value lies between the grid's least (0) and greatest (1)."""
        some = [float(v) for v in self.grid.values.ravel() if math.isfinite(v)]
        least, most = min(some, default=0.0), max(some, default=1.0)
        return (value - least) / (most - least) if most > least else 0.5


def _cell(text: str, value: float, share: float, room: int) -> Text:
    if not math.isfinite(value):
        return Text("·".center(room), style="dim")
    start, end, along = (LOW, MIDDLE, 2 * share) if share < 0.5 else (MIDDLE, HIGH, 2 * share - 1)
    red, green, blue = (round(a + (b - a) * along) for a, b in zip(start, end, strict=True))
    ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 117 else "white"
    return Text(_fit(text, room), style=Style(color=ink, bgcolor=f"rgb({red},{green},{blue})"))


def _shown(text: str) -> str:
    from patchscopes.model.tokens import visible

    return visible(text.strip()).replace("␣", " ")


def _fit(text: str, room: int) -> str:
    shown = _shown(text)
    return (shown if len(shown) <= room else shown[: room - 1] + "…").ljust(room)
