"""Two runs beside each other, and a run beside itself computed again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from patchscopes.core.errors import InputError, RefusedError
from patchscopes.experiment.resolve import INPUTS
from patchscopes.runs.conditions import differences
from patchscopes.runs.folder import Run, write_table
from patchscopes.runs.schema import COORDINATES, RESULTS

TEXTS = ("status", "text", "next_token_id", "verdict")  # what must be equal
NUMBERS = tuple(name for name, kind in RESULTS.items() if kind == pl.Float64)
TOLERANCE = 1e-3  # nats, bits, ratios: more than batches and machines of one kind change in float32
TOGETHER = 256  # readings that are computed again at a time
WHERE = tuple(name for name in COORDINATES if name != "cell")


@dataclass(frozen=True, eq=False)
class Comparison:
    """compared, same: cells; changed: a row a cell and column that differ (coordinates, column, before, after, difference);
    only_before, only_after: cells that one side lacks; conditions: what changed between them; largest: difference of numbers."""

    compared: int
    same: int
    changed: pl.DataFrame
    only_before: int
    only_after: int
    conditions: tuple[str, ...]
    largest: float

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {**vars(self), "changed": self.changed.to_dicts()}


def diff(before: Run, after: Run, *, tolerance: float = TOLERANCE) -> Comparison:
    """Cells of equal coordinates side by side: part, model, scope, prompt, position, layers, map, control, draw."""
    one, two = (run.scan().select(*COORDINATES, *TEXTS, *NUMBERS).collect() for run in (before, after))
    changed = differences(before.provenance[-1].get("conditions", {}), after.provenance[-1].get("conditions", {}))
    return compare(one, two, on=WHERE, tolerance=tolerance, conditions=changed)


def compare(
    before: pl.DataFrame, after: pl.DataFrame, *, on: Sequence[str] = ("cell",), tolerance: float, conditions: Sequence[str] = ()
) -> Comparison:
    """Two tables of rows, matched by the columns `on`."""
    both = before.join(after, on=list(on), how="inner", suffix="_after", nulls_equal=True)
    found = []
    largest = 0.0
    differs = pl.lit(False)
    for name in (*TEXTS, *NUMBERS):
        old, new = pl.col(name), pl.col(f"{name}_after")
        unlike = old.ne_missing(new)
        gap = None
        if name in NUMBERS:
            gap = (old - new).abs()
            both_nan = old.is_nan() & new.is_nan()
            unlike = unlike & ~both_nan.fill_null(False) & (gap.is_null() | gap.is_nan() | (gap > tolerance))
            top = both.select(gap.filter(gap.is_finite()).max()).item()
            largest = max(largest, top or 0.0)
        differs = differs | unlike
        rows = both.filter(unlike).select(
            *on,
            *(column for column in ("cell", *WHERE) if column not in on and column in both.columns),
            column=pl.lit(name),
            before=old.cast(pl.String),
            after=new.cast(pl.String),
            difference=gap if gap is not None else pl.lit(None, pl.Float64),
        )
        found.append(rows)
    changed = pl.concat(found)
    n = int(both.select(differs.sum()).item() or 0)
    return Comparison(
        len(both), len(both) - n, changed, len(before) - len(both), len(after) - len(both), tuple(conditions), largest
    )


def reproduce(
    run: Run,
    *,
    sample: int | None = 200,
    seed: int = 0,
    device: str | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int, str], None] = lambda done, of, what: None,
) -> Comparison:
    """Compute some readings of a run, or of what `export` made of it, again, here and now, with their controls, and compare.
    sample: how many; None: all. The folder stays as it is. InputError if nothing of it is finished."""
    from patchscopes.runs.work import Job, Task, Worker

    if run.is_old:
        raise RefusedError(
            f"{str(run.path)!r} was saved by an older version, without its experiment; it cannot be computed again"
        )
    done = set(run.scan().filter((pl.col("status") == "ok") & (pl.col("control") == "none")).select("cell").collect()["cell"])
    if not done:
        raise InputError(f"the run {run.id} has no finished reading to reproduce")
    worker = Worker.of(Job(run.spec, str(run.path)), device)
    there = [
        (look, k)
        for look, one in enumerate(worker.seen)
        for k, cell in enumerate(one.viewing.cells)
        if one.cell_id(cell, "none") in done
    ]
    if not there:
        changed = "; ".join(differences(run.provenance[-1]["conditions"], worker.conditions)) or "nothing that is recorded"
        raise InputError(f"none of the cells is the same cell any more: what changed is {changed}")
    if sample is not None and sample < len(there):
        there = sorted(random.Random(seed).sample(there, sample))
    found = []
    for start in range(0, len(there), TOGETHER):
        progress(start, len(there), "computing again")
        some = there[start : start + TOGETHER]
        for look in dict.fromkeys(look for look, _ in some):
            cells = tuple(k for other, k in some if other == look)
            found.append(pl.read_parquet(worker.do(Task(0, look, cells)).rows))
    again = pl.concat(found)
    before = run.scan().join(again.lazy().select("cell"), on="cell", how="semi").collect()
    return compare(
        before,
        again,
        tolerance=tolerance,
        conditions=differences(run.provenance[-1].get("conditions", {}), worker.conditions),
    )


def export(run: Run, folder: Path, formats: Sequence[str]) -> list[Path]:
    """The finished rows as one table, with prompts and labels, in each of the formats parquet, csv, jsonl; and run.json."""
    from patchscopes.core.files import make_folder, told, write_json

    make_folder(folder)
    table = run.table()
    written = []
    for name in formats:
        path = folder / f"table.{name}"
        with told(path):
            if name == "parquet":
                table.write_parquet(path)
            elif name == "csv":
                lists = [column for column, kind in table.schema.items() if isinstance(kind, pl.List)]
                table.with_columns(pl.col(lists).cast(pl.List(pl.String)).list.join(" ")).write_csv(path)
            else:
                table.write_ndjson(path)
        written.append(path)
    write_json(folder / "run.json", run.record)
    write_table(folder / "plan.parquet", run.plan)
    write_table(folder / "prompts.parquet", run.prompts)
    if (run.path / INPUTS).is_dir():
        shutil.copytree(run.path / INPUTS, folder / INPUTS, dirs_exist_ok=True)
    return [*written, folder / "run.json"]
