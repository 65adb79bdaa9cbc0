"""`patchscopes runs`, `show`, `watch`, `diff`, `export`: look at what was recorded. None of them loads torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.live import watching
from patchscopes.cli.options import Json
from patchscopes.cli.sweep import RunsFolder, WhichRun
from patchscopes.cli.terminal import data, print_json, say
from patchscopes.core.errors import UnknownName, nearest

if TYPE_CHECKING:
    from patchscopes.runs import Run

FORMATS = ("parquet", "csv", "jsonl")
LONGEST = 60  # characters of a text in a table


def runs(
    search: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="Only runs whose name, model, scope or date has this in it.")
    ] = "",
    runs: RunsFolder = Path("runs"),
    json: Json = False,
) -> None:
    """List recorded runs, the latest first."""
    from patchscopes.runs import open_run
    from patchscopes.runs.folder import run_folders

    rows = []
    for folder in run_folders(runs):
        run = open_run(folder)
        row = _summary(run)
        if search.lower() in " ".join(map(str, row.values())).lower():
            rows.append(row)
    if json:
        print_json(rows)
        return
    if not rows:
        say(f"no runs{f' with {search!r}' if search else ''} in {str(runs)!r}; make one with: patchscopes sweep")
        return
    from rich.table import Table

    table = Table()
    for heading in ("run", "name", "status", "cells", "models", "scopes", "created"):
        table.add_column(heading, justify="right" if heading == "cells" else "left", overflow="fold")
    for row in rows:
        cells = f"{row['done']:,}/{row['cells']:,}" if row["done"] < row["cells"] else f"{row['cells']:,}"
        table.add_row(
            row["run"], row["name"], row["status"], cells, ", ".join(row["models"]), ", ".join(row["scopes"]), row["created"]
        )
    data().print(table)


def _summary(run: Run) -> dict[str, Any]:
    """What can be said of a run without reading its rows."""
    record = run.record
    counts = record.get("counts") or run.counts
    return {
        "run": run.id,
        "name": run.name,
        "status": run.status,
        "cells": run.cells,
        "done": run.cells - counts["waiting"],
        "failed": counts["failed"],
        "models": list(dict.fromkeys(look["model"] for look in record["looks"])),
        "scopes": list(dict.fromkeys(_short(look["scope"], 40) for look in record["looks"])),
        "created": record["created"][:16].replace("T", " "),
        "folder": str(run.path),
    }


def show(
    run: WhichRun,
    part: Annotated[str | None, typer.Option(help="Of a run of several parts, this.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Of several models, this.", show_default=False)] = None,
    scope: Annotated[str | None, typer.Option(help="Of several scopes, this.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=0, help="Readings shown at most.")] = 40,
    failed: Annotated[bool, typer.Option("--failed", help="Show failed cells and why.")] = False,
    runs: RunsFolder = Path("runs"),
    json: Json = False,
) -> None:
    """Show a run, finished or not: its state, what it was computed with, and its readings."""
    from patchscopes.runs import open_run

    found = open_run(run, runs=runs)
    where = {name: value for name, value in (("part", part), ("model", model), ("scope", scope)) if value is not None}
    for name, value in where.items():
        known = list(dict.fromkeys(look[name] for look in found.record["looks"]))
        if value not in known:
            raise UnknownName(f"this run has no {name} {value!r}. {nearest(value, known)}")
    table = found.table(**where, **({"status": "failed"} if failed else {"control": "none"}))
    if json:
        about = {"caveats": found.caveats, "provenance": found.provenance, "spec": found.spec}
        print_json({**_summary(found), "counts": found.counts, **about, "readings": table.head(rows).to_dicts()})
        return
    console = data()
    counts = found.counts
    console.print(f"[bold]{found.id}[/bold]  ", end="")
    console.print(
        f"{found.name}: {found.status}, {found.cells:,} cells ({counts['ok']:,} ok, {counts['failed']:,} failed, "
        f"{counts['skipped']:,} could not be, {counts['waiting']:,} waiting)",
        markup=False,
    )
    for entry in found.provenance[-1:]:
        versions = entry.get("conditions", {}).get("versions", {})
        models = entry.get("conditions", {}).get("models", {})
        for name, about in models.items():
            console.print(f"{name}: {about['dtype']}, attention {about['attention']}", markup=False)
        named = ", ".join(f"{name} {versions[name]}" for name in ("patchscopes", "torch", "transformers") if name in versions)
        console.print(named, markup=False)
    for caveat in found.caveats:
        console.print(f"note: {caveat}", markup=False)
    _print_rows(console, table.head(rows), failed=failed)
    if len(table) > rows:
        say(f"{len(table) - rows:,} more; --rows shows more, `patchscopes export` all")
    if counts["waiting"]:
        say(f"go on with: patchscopes resume {found.id}")


def _print_rows(console: Any, table: Any, *, failed: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    if table.is_empty():
        console.print("nothing failed" if failed else "no readings yet")
        return
    shown = Table()
    several = [name for name in ("part", "model", "scope") if table[name].n_unique() > 1]
    for heading in (
        *several,
        "prompt",
        "token",
        "ℓ",
        "ℓ*",
        *(("why",) if failed else ("says", "bits over others", "p", "verdict")),
    ):
        shown.add_column(heading, justify="right" if heading in ("ℓ", "ℓ*", "bits over others", "p") else "left")
    for row in table.iter_rows(named=True):
        cells = [_short(str(row[name]), 30) for name in several] + [_short(row["prompt_text"], 40), row["token"]]
        cells += [str(row["source_layer"]), str(row["target_layer"])]
        if failed:
            cells.append(_short(row["error"] or "", 200))
        else:
            bits, p = row["bits_over_others"], row["p_value"]
            cells += [
                _short((row["text"] or "").strip(), LONGEST),
                "" if bits is None else f"{bits:+.1f}",
                "" if p is None else f"{p:.2f}",
                row["verdict"] or "",
            ]
        shown.add_row(*map(Text, cells))
    console.print(shown)


def watch(run: WhichRun, runs: RunsFolder = Path("runs"), json: Json = False) -> None:
    """Follow a run that another process works on, until it ends. Ctrl-C stops watching, not the run."""
    from patchscopes.runs import open_run
    from patchscopes.runs.events import read_events

    found = open_run(run, runs=runs)
    seen = 0
    with watching(json=json) as listener:
        while True:
            for event in read_events(found.path / "events.jsonl"):
                if event["seq"] > seen:
                    seen = event["seq"]
                    listener(event)
            if (status := found.refresh().status) not in ("running", "planned"):
                break
            time.sleep(0.5)
    if not json:
        counts = found.refresh().counts
        say(f"{status}: {counts['ok']:,} ok, {counts['failed']:,} failed, {counts['waiting']:,} waiting of {found.cells:,}")


def logs(
    run: WhichRun,
    shard: Annotated[
        int | None, typer.Argument(metavar="[SHARD]", help="Only what happened to this shard.", show_default=False)
    ] = None,
    runs: RunsFolder = Path("runs"),
    json: Json = False,
) -> None:
    """Print what happened in a run: its events, in order."""
    from patchscopes.runs import open_run

    events = [e for e in open_run(run, runs=runs).events() if shard is None or e.get("shard") == shard]
    if json:
        print_json(events)
        return
    for event in events:
        more = "  ".join(f"{key}={value}" for key, value in event.items() if key not in ("seq", "time", "kind"))
        print(f"{event['seq']:>6}  {event['time'][:19]}  {event['kind']:<9}  {more}")


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="A run.")],
    after: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    tolerance: Annotated[float, typer.Option(min=0, help="Numbers that differ by no more are the same.")] = 1e-3,
    rows: Annotated[int, typer.Option(min=0, help="Differences shown at most.")] = 20,
    runs: RunsFolder = Path("runs"),
    json: Json = False,
) -> None:
    """Compare two runs, cell by cell of equal coordinates. Exit code 0, whatever is found."""
    from patchscopes.runs import open_run
    from patchscopes.runs.compare import diff as compare

    found = compare(open_run(before, runs=runs), open_run(after, runs=runs), tolerance=tolerance)
    print_json(found.to_json()) if json else show_comparison(found, rows)


def show_comparison(found: Any, rows: int) -> None:
    """A comparison for a terminal."""
    console = data()
    console.print(
        f"{found.compared:,} cells compared: {found.same:,} the same, {found.compared - found.same:,} different", markup=False
    )
    if found.only_before or found.only_after:
        console.print(f"only in the first: {found.only_before:,}; only in the second: {found.only_after:,}", markup=False)
    console.print(f"largest difference of a number: {found.largest:.2g}", markup=False)
    for line in found.conditions:
        console.print(f"changed: {line}", markup=False)
    if not found.changed.is_empty():
        from rich.table import Table
        from rich.text import Text

        shown = Table()
        names = [
            n for n in ("scope", "prompt", "position", "source_layer", "target_layer", "control", "column", "before", "after")
        ]
        for name in names:
            shown.add_column(name.replace("_", " "))
        for row in found.changed.head(rows).iter_rows(named=True):
            shown.add_row(*(Text(_short(str(row[name]), 40)) for name in names))
        console.print(shown)


def export(
    run: WhichRun,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path("export"),
    format: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(FORMATS)}; may be given several times. Default: parquet.")
    ] = None,
    runs: RunsFolder = Path("runs"),
) -> None:
    """Write a run's rows as one table, with prompts, labels and controls, and its provenance beside it."""
    from patchscopes.runs import open_run
    from patchscopes.runs.compare import export as write

    formats = format or ["parquet"]
    for name in formats:
        if name not in FORMATS:
            raise UnknownName(f"unknown format {name!r}. {nearest(name, FORMATS)}")
    for path in write(open_run(run, runs=runs), out, formats):
        print(path)


def _short(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"
