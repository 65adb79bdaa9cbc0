"""`patchscopes sweep`, `resume` and `retry`: experiments as runs that survive."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchscopes.cli.live import watching
from patchscopes.cli.spec_options import experiment_from, with_experiment_options
from patchscopes.cli.terminal import amount, data, duration, print_json, say
from patchscopes.core.errors import InputError, UnknownName, nearest

if TYPE_CHECKING:
    from patchscopes.runs import Executor, Run, Stop
    from patchscopes.runs.estimate import Estimate

CHANGES = ("refuse", "mark", "new")
DETACHED = ("slurm", "command")  # executors for which nobody waits
UNITS = {"m": 1, "h": 60, "d": 24 * 60}

RunsFolder = Annotated[Path, typer.Option("--runs", help="Where run folders are.")]
WhichRun = Annotated[str, typer.Argument(metavar="RUN", help="A run: its folder, its id or the beginning of that, or its name.")]
ExecutorName = Annotated[str, typer.Option("--executor", help="Who works: here, local (processes of this machine) or ray.")]
Planner = Annotated[
    str,
    typer.Option(
        "--executor",
        help="Who works: here, local (processes of this machine), ray; slurm: plan, submit jobs and return; command: plan, and print what "
        "starts each part.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="How many. Default: one a GPU, else one.", show_default=False)]
Gpus = Annotated[
    float | None, typer.Option(help="With ray: GPUs that a worker takes; several for a model on several.", show_default=False)
]
Address = Annotated[str | None, typer.Option(help="Of the Ray cluster, as ray.init takes it.", show_default=False)]
OnChange = Annotated[
    str,
    typer.Option(
        "--on-change", help="If models or versions changed since: refuse, mark (say so in new rows) or new (a new run)."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print every event as a line of JSON.")]


@with_experiment_options
def sweep(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="An experiment: .toml, .yaml or .json. Options override its keys.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, from a short probe; compute nothing else.")
    ] = False,
    probe: Annotated[
        bool, typer.Option(help="With --dry-run: time some cells. Without, no weights are loaded; give --hardware for a time.")
    ] = True,
    hardware: Annotated[
        str | None, typer.Option(help="With --no-probe: the card to reckon with, such as h100.", show_default=False)
    ] = None,
    runs: RunsFolder = Path("runs"),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's own folder.", show_default=False)] = None,
    executor: Planner = "here",
    workers: Workers = None,
    gpus: Gpus = None,
    address: Address = None,
    array: Annotated[int, typer.Option(min=1, help="With slurm or command: parts, each a job.")] = 8,
    limit_time: Annotated[
        str, typer.Option("--time", help="With slurm: of a job, such as 90m, 4h, 2d; it asks for another turn when it is up.")
    ] = "1h",
    partition: Annotated[str | None, typer.Option(help="With slurm: where the jobs go.", show_default=False)] = None,
    new: Annotated[
        bool, typer.Option("--new", help="A new run, though the same was asked before; nothing is taken over.")
    ] = False,
    on_change: OnChange = "refuse",
    quiet: Quiet = False,
    json: JsonLines = False,
    **flags: Any,
) -> None:
    """Look at many hidden states, and record it: a run that survives Ctrl-C, crashes and reboots.

    \b
    patchscopes sweep experiment.toml --dry-run
    patchscopes sweep --prompt "Diana, Princess of Wales" --at Wales --scope describe
    The same again is instant; a run that was stopped goes on.
    """
    _require(on_change, CHANGES, "--on-change")
    devices = flags.pop("device") if executor == "local" else None  # of its processes, not of the experiment
    experiment = experiment_from(file, **flags)
    if dry_run:
        from patchscopes.runs.estimate import estimate

        found = estimate(experiment, probe=probe, hardware=hardware, workers=workers or 1, device=flags.get("device"))
        print_json(found.to_json()) if json else _show_estimate(found)
        return
    from patchscopes.runs import Stop
    from patchscopes.runs.recording import sweep as record

    stop = Stop()
    detached = executor in DETACHED
    with watching(json=json, quiet=quiet) as listener:
        run = record(
            experiment,
            runs=runs,
            folder=out,
            executor=_planning(flags.get("device"), gpus) if detached else _executor(executor, workers, devices, gpus, address),
            work=not detached,
            new=new,
            on_change=on_change,  # type: ignore[arg-type]  # checked above
            listeners=[listener],
            stop=stop,
        )
    if detached:
        _hand_out(run, executor, array, minutes(limit_time), gpus, partition)
    else:
        _end(run, stop, json=json, quiet=quiet)


def resume(
    run: WhichRun,
    runs: RunsFolder = Path("runs"),
    executor: ExecutorName = "here",
    workers: Workers = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … where the experiment names none.", show_default=False)] = None,
    gpus: Gpus = None,
    address: Address = None,
    on_change: OnChange = "refuse",
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Go on with a run that was stopped or killed. Nothing that was finished is computed again."""
    _again(run, runs, executor, workers, device, gpus, address, on_change, quiet, json, failed=False)


def retry(
    run: WhichRun,
    failed: Annotated[bool, typer.Option("--failed", help="Failed cells; the only kind that can be tried again.")] = True,
    runs: RunsFolder = Path("runs"),
    executor: ExecutorName = "here",
    workers: Workers = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … where the experiment names none.", show_default=False)] = None,
    gpus: Gpus = None,
    address: Address = None,
    on_change: OnChange = "refuse",
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Try the failed cells of a run again, and do what is left."""
    _again(run, runs, executor, workers, device, gpus, address, on_change, quiet, json, failed=failed)


def _again(
    which: str,
    runs: Path,
    executor: str,
    workers: int | None,
    device: str | None,
    gpus: float | None,
    address: str | None,
    on_change: str,
    quiet: bool,
    json: bool,
    *,
    failed: bool,
) -> None:
    _require(on_change, CHANGES, "--on-change")
    from patchscopes.runs import Stop
    from patchscopes.runs.recording import resume as go_on

    stop = Stop()
    with watching(json=json, quiet=quiet) as listener:
        run = go_on(
            which,
            runs=runs,
            executor=_executor(executor, workers, device, gpus, address),
            on_change=on_change,  # type: ignore[arg-type]  # checked above
            failed=failed,
            listeners=[listener],
            stop=stop,
        )
    _end(run, stop, json=json, quiet=quiet)


def _require(value: str, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise UnknownName(f"unknown {what} {value!r}. {nearest(value, known)}")


def _executor(name: str, workers: int | None, device: str | None, gpus: float | None, address: str | None) -> Executor:
    from patchscopes.runs.executors import executor_from

    return executor_from(name, workers=workers, device=device, gpus=gpus, address=address)


def minutes(text: str) -> int:
    """ "90m", "4h", "2d" as minutes. InputError otherwise."""
    match = re.fullmatch(r"(\d+)([mhd])", text.strip())
    if match is None or int(match[1]) == 0:
        raise InputError(f"--time is {text!r}; expected minutes, hours or days, such as 90m, 4h, 2d")
    return int(match[1]) * UNITS[match[2]]


def _planning(device: str | None, gpus: float | None) -> Executor:
    """Plans for workers that are started elsewhere, with the kind of device that they will have."""
    from patchscopes.runs.processes import Processes

    return Processes(1, devices=[device or ("cuda" if gpus else "cpu")])


def _hand_out(run: Run, executor: str, parts: int, time: int, gpus: float | None, partition: str | None) -> None:
    """Submit the parts of a planned run, or print what starts each."""
    if run.counts["waiting"] == 0:
        say("nothing is left to do")
        return
    if executor == "command":
        from patchscopes.runs.parts import commands

        for line in commands(run.path, parts):
            print(line)
        return
    from patchscopes.runs.on_slurm import submit

    for job in submit(run.path, parts, gpus=int(gpus or 0), time=time, partition=partition):
        print(job)
    say(f"submitted; patchscopes show {run.id} tells how far they are, patchscopes resume {run.id} does what they leave")


def _end(run: Run, stop: Stop, *, json: bool, quiet: bool) -> None:
    """What became of it, and the exit code: 0 done, 3 some cells failed, 130 or 143 stopped."""
    counts = run.counts
    done = run.cells - counts["waiting"]
    if not json and not quiet:
        say(f"{done:,} of {run.cells:,} cells done, {counts['failed']:,} failed, {counts['skipped']:,} could not be")
        for caveat in run.caveats:
            say(f"note: {caveat}")
    if not json:
        print(run.path)
    if counts["waiting"]:
        if not quiet:
            say(f"stopped; nothing that was finished is lost. Go on with: patchscopes resume {run.id}")
        raise typer.Exit(143 if stop.signal == 15 else 130)
    if counts["failed"]:
        say(f"try the failed cells again with: patchscopes retry {run.id} --failed")
        raise typer.Exit(3)
    if not json and not quiet:
        say(f"see it with: patchscopes show {run.id}, patchscopes report {run.id}")


def _show_estimate(found: Estimate) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    for name, value in found.lines(amount, duration):
        table.add_row(name, value)
    data().print(table)
    say("nothing was recorded")
