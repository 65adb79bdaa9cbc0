"""`patchscopes run-shard`: a part of a run, for schedulers that start processes on their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchscopes.cli.live import watching
from patchscopes.cli.terminal import say


def run_shard(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run: its folder, its id or the beginning of that, or its name.")],
    part: Annotated[str, typer.Argument(metavar="K/N", help="Which part of how many: 1/8 is the first of eight.")],
    runs: Annotated[Path, typer.Option("--runs", help="Where run folders are.")] = Path("runs"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … where the experiment names none.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch, on a CPU.", show_default=False)] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Try failed cells again, too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every event as a line of JSON.")] = False,
) -> None:
    """Do a part of what is left of a run, beside other parts, on any machine that has its folder.

    \b
    patchscopes run-shard runs/2026-11-20_countries_7f3c 1/8
    SIGTERM or SIGUSR1 ends it after the shard under way. `show` tells how far all parts are.
    """
    from patchscopes.runs.executor import Stop
    from patchscopes.runs.parts import part_of, work_part

    k, n = part_of(part)
    stop = Stop()
    with watching(json=json, quiet=quiet) as listener:
        made = work_part(run, k, n, runs=runs, device=device, threads=threads, failed=failed, listeners=[listener], stop=stop)
    if stop.asked:
        if not quiet and not json:
            say(f"stopped; nothing that was finished is lost. Go on with the same command, or with: patchscopes resume {made.id}")
        raise typer.Exit(130 if stop.signal == 2 else 143)
    if made.counts["failed"]:
        raise typer.Exit(3)
