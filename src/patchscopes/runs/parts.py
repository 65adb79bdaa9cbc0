"""Work in a shared folder without anyone who drives it: a run is divided into N parts, and each is done by a process of its own, wherever
and whenever a scheduler starts it.

A part holds the run's lock together with other parts, so that no `resume` works at the same time, and its own alone. It writes pieces
itself, and events into events.d/part-K-of-N.jsonl; run.json is written by the part that is the last to end, or by `resume`.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from patchscopes.core.errors import InputError, RefusedError
from patchscopes.core.files import make_folder
from patchscopes.runs.drive import add_about, close, drive
from patchscopes.runs.events import EventLog, Listener
from patchscopes.runs.executor import Stop
from patchscopes.runs.folder import Run, open_run
from patchscopes.runs.here import Here
from patchscopes.runs.lock import Lock
from patchscopes.runs.recording import tasks_left
from patchscopes.runs.remote import MakeWorker, make_worker
from patchscopes.runs.tasks import Job

EVENTS = "events.d"


def part_of(text: str) -> tuple[int, int]:
    """(2, 8) of "2/8". InputError if it is no part."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"found the part {text!r}; expected K/N, such as 1/8 for the first of eight")
    return int(match[1]), int(match[2])


def commands(which: str | Path, n: int, *, runs: str | Path = "runs", more: Sequence[str] = ()) -> list[str]:
    """A shell command a part, for schedulers of any kind. more: further options."""
    folder = open_run(which, runs=runs).path.absolute()
    return [shlex.join(["patchscopes", "run-shard", str(folder), f"{k}/{n}", *more]) for k in range(1, n + 1)]


def work_part(
    which: str | Path,
    k: int,
    n: int,
    *,
    runs: str | Path = "runs",
    device: str | None = None,
    threads: int | None = None,
    failed: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Stop | None = None,
    make: MakeWorker = make_worker,
) -> Run:
    """Do the K-th of N parts of what is left of a run; the run as it is then.

    device, threads  of torch
    failed           try failed cells of the part again, too

    SIGTERM, SIGINT and SIGUSR1 end it after the shard under way, twice at once. RefusedError if something else works on the run or on
    this part, or if models, number formats or versions are not those of the run.
    """
    part_of(f"{k}/{n}")
    run = open_run(which, runs=runs)
    name = f"part-{k}-of-{n}"
    folder = make_folder(run.path / EVENTS)
    with Lock(folder / f"{name}.lock"):
        with Lock(run.path / "run.lock", shared=True):
            run = run.refresh()
            tasks = [task for task in tasks_left(run, failed=failed) if task.shard % n == k - 1]
            worker = make(Job(run.spec, str(run.path)), device, threads) if tasks else None
            with contextlib.closing(EventLog(folder / f"{name}.jsonl", tuple(listeners))) as log:
                drive(run, tasks, Here(worker=worker), log, stop or Stop(), alone=False)
        _end_if_last(run)
    return run.refresh()


def _end_if_last(run: Run) -> None:
    """Write into the record how the run went and who did it, unless another part still works, which then does."""
    with contextlib.suppress(RefusedError), Lock(run.path / "run.lock"):
        run = run.refresh()
        for event in run.events():
            if event["kind"] == "worker" and "about" in event:
                add_about(run.provenance[-1], event["about"])
        close(run)
