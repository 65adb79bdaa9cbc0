"""`patchscopes reproduce`: compute some of a run again, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchscopes.cli.options import Device, Json
from patchscopes.cli.runs import show_comparison
from patchscopes.cli.sweep import RunsFolder, WhichRun
from patchscopes.cli.terminal import print_json, progress


def reproduce(
    run: WhichRun,
    sample: Annotated[int, typer.Option(min=1, help="Readings that are computed again, with their controls.")] = 200,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    tolerance: Annotated[float, typer.Option(min=0, help="Numbers that differ by no more are the same.")] = 1e-3,
    rows: Annotated[int, typer.Option(min=0, help="Differences shown at most.")] = 20,
    device: Device = None,
    runs: RunsFolder = Path("runs"),
    json: Json = False,
) -> None:
    """Compute a sample of a run again, here and now, and say what differs, and what changed since. Exit code 3 if something differs."""
    from patchscopes.runs import open_run
    from patchscopes.runs.compare import reproduce as again

    with progress() as report:
        found = again(
            open_run(run, runs=runs),
            sample=None if everything else sample,
            seed=seed,
            device=device,
            tolerance=tolerance,
            progress=report,
        )
    print_json(found.to_json()) if json else show_comparison(found, rows)
    if found.same < found.compared:
        raise typer.Exit(3)
