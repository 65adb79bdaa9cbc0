"""What a Patchscope read: a table, a row a cell, with provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console, ConsoleOptions
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchscopes.core.errors import InputError, NotAvailableError, UnknownName, nearest
from patchscopes.scopes.show import as_html, as_rich

FORMAT = 1
KEYS = ("prompt", "position", "source_layer", "target", "target_layer", "map", "draw")  # what tells cells apart
SCHEMA: dict[str, Any] = {
    "prompt": pl.Int64,
    "prompt_text": pl.String,
    "position": pl.Int64,
    "token": pl.String,
    "source_layer": pl.Int64,
    "target": pl.Int64,
    "target_layer": pl.Int64,
    "map": pl.String,
    "control": pl.String,
    "draw": pl.Int64,
    "text": pl.String,
    "n_tokens": pl.Int64,
    "next_token": pl.String,
    "next_token_id": pl.Int64,
    "logprob": pl.Float64,
    "surprisal": pl.Float64,
    "norm_ratio": pl.Float64,
    "bits_over_nothing": pl.Float64,
    "bits_over_random": pl.Float64,
    "bits_over_others": pl.Float64,
    "bits_over_text": pl.Float64,
    "explained": pl.Float64,
    "p_value": pl.Float64,
    "verdict": pl.String,
}
UNITS = {
    "surprisal": "bits",
    "logprob": "nats",
    "norm_ratio": "ratio",
    "p_value": "probability",
    "explained": "share",
    **{f"bits_over_{k}": "bits" for k in ("nothing", "random", "others", "text")},
}


@dataclass(frozen=True, eq=False)
class Grid:
    """A labelled array for a heat map. values[row, column]; NaN where there is no cell."""

    values: np.ndarray
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_name: str
    column_name: str
    metric: str
    units: str
    texts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Readings:
    """The cells of one call of a Patchscope.

    table       a row a cell and control: `control` is "none" for the reading itself, else "nothing", "random", "other", "mean", "text", or
                what was asked for instead
    logits      [row, vocab], the patched runs' next-token logits, aligned with the table's rows; None unless they were kept. Under
                guidance they, and `logprob`, are p + w (p − u) and not the patched run's own p
    provenance  models, prompts with token ids, settings, seeds, versions, time
    """

    table: pl.DataFrame
    provenance: dict[str, Any]
    logits: Tensor | None = field(default=None, repr=False)

    @property
    def readings(self) -> pl.DataFrame:
        """The rows of the readings themselves, without those of their controls."""
        return self.table.filter(pl.col("control") == "none")

    def grid(
        self,
        metric: str = "surprisal",
        *,
        prompt: int = 0,
        target: int = 0,
        position: int | None = None,
        map: str | None = None,
        draw: int = 0,
    ) -> Grid:
        """`metric` of the readings of one prompt as an array: source layer × target layer, or source layer × position where the
        target layer follows the source layer or is only one. Several positions and target layers at once: say which position."""
        if metric not in UNITS:
            raise UnknownName(f"unknown metric {metric!r}. {nearest(metric, UNITS)}")
        some = self.readings.filter((pl.col("prompt") == prompt) & (pl.col("target") == target) & (pl.col("draw") == draw))
        if map is not None:
            some = some.filter(pl.col("map") == map)
        if position is not None:
            some = some.filter(pl.col("position") == position)
        if some.is_empty():
            raise InputError(f"no reading has prompt {prompt}, target {target}, position {position}, map {map}, draw {draw}")
        full = some.group_by("source_layer", "position").agg(pl.col("target_layer").n_unique())["target_layer"].max()
        column = "target_layer" if isinstance(full, int) and full > 1 else "position"
        if some.select("source_layer", column).is_duplicated().any():
            raise InputError("several readings fall into one cell of this grid; choose one position=… and one map=…")
        rows = sorted(some["source_layer"].unique())
        columns = sorted(some[column].unique())
        values = np.full((len(rows), len(columns)), np.nan)
        texts = [["" for _ in columns] for _ in rows]
        for cell in some.iter_rows(named=True):
            r, c = rows.index(cell["source_layer"]), columns.index(cell[column])
            values[r, c] = np.nan if cell[metric] is None else cell[metric]
            texts[r][c] = cell["text"]
        tokens = dict(some.select("position", "token").iter_rows())
        labels = tuple(f"{c}: {tokens[c]}" if column == "position" else str(c) for c in columns)
        name = "position" if column == "position" else "target layer ℓ*"
        return Grid(
            values,
            tuple(str(row) for row in rows),
            labels,
            "source layer ℓ",
            name,
            metric,
            UNITS[metric],
            tuple(tuple(t) for t in texts),
        )

    def save(self, folder: str | Path) -> Path:
        """Write `readings.parquet`, `readings.json` (provenance) and, if logits were kept, `logits.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.table.write_parquet(folder / "readings.parquet")
        (folder / "readings.json").write_text(
            json.dumps({"format": FORMAT, **self.provenance}, indent=1, ensure_ascii=False) + "\n"
        )
        (folder / "logits.safetensors").unlink(missing_ok=True)  # of readings that lay here before
        if self.logits is not None:
            save_file({"logits": self.logits.contiguous()}, folder / "logits.safetensors")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Readings:
        """Open what `save` wrote."""
        folder = Path(folder)
        if not (folder / "readings.parquet").exists() or not (folder / "readings.json").exists():
            raise NotAvailableError(
                f"no readings in {str(folder)!r}: expected readings.parquet and readings.json, as Readings.save writes them"
            )
        provenance = json.loads((folder / "readings.json").read_text())
        if (version := provenance.pop("format", None)) != FORMAT:
            raise NotAvailableError(f"{folder} holds readings of format {version}; this version reads format {FORMAT}")
        logits = load_file(folder / "logits.safetensors")["logits"] if (folder / "logits.safetensors").exists() else None
        return cls(pl.read_parquet(folder / "readings.parquet"), provenance, logits)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        yield as_rich(self.table, self.provenance, width=options.max_width)

    def _repr_html_(self) -> str:
        return as_html(self.table, self.provenance)

    def __str__(self) -> str:
        console = Console(width=150, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    __repr__ = __str__
