"""Work in a shared folder without anyone who drives it: a run is divided into N parts, and each is done by a process of its own, wherever
and whenever a scheduler starts it.

A part holds the run's lock together with other parts, so that no `resume` works at the same time, and its own alone. It writes pieces
itself, and events into events.d/part-K-of-N.jsonl; run.json is written by the part that is the last to end, or by `resume`.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.core.errors import InputError, RefusedError
from patchscopes.core.files import make_folder
from patchscopes.runs.conditions import differences
from patchscopes.runs.drive import put_done
from patchscopes.runs.events import EventLog, Listener
from patchscopes.runs.executor import Stop, check_stop
from patchscopes.runs.folder import Run, compact, open_run, write_record
from patchscopes.runs.lock import Lock
from patchscopes.runs.recording import tasks_left
from patchscopes.runs.remote import MakeWorker, make_worker
from patchscopes.runs.tasks import Job, Stopped, Task

if TYPE_CHECKING:
    from patchscopes.runs.work import Worker

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
    stop = stop or Stop()
    name = f"part-{k}-of-{n}"
    folder = make_folder(run.path / EVENTS)
    with Lock(folder / f"{name}.lock"):
        with Lock(run.path / "run.lock", shared=True), _signals(stop):
            run = run.refresh()
            tasks = [task for task in tasks_left(run, failed=failed) if task.shard % n == k - 1]
            with contextlib.closing(EventLog(folder / f"{name}.jsonl", tuple(listeners))) as log:
                log.tell("started", run=run.id, part=name, shards=len(tasks))
                if tasks:
                    _work(run, name, make(Job(run.spec, str(run.path)), device, threads), tasks, log, stop)
                log.tell("stopped" if stop.asked else "done", part=name)
        _end_if_last(run)
    return run.refresh()


def _work(run: Run, name: str, worker: Worker, tasks: Sequence[Task], log: EventLog, stop: Stop) -> None:
    about = worker.about
    if changed := differences(run.provenance[-1]["conditions"], about["conditions"]):
        raise RefusedError(
            f"{name} would compute under other conditions than the run {run.id}: {'; '.join(changed)}. Give it the same versions, and say "
            "device and dtype in the experiment where machines differ"
        )
    log.tell("worker", worker=name, state="ready", models=about["models"], machine=about["machine"])

    def tell(text: str) -> None:
        log.tell("memory", worker=name, message=text)

    for task in tasks:
        if stop.asked:
            return
        try:
            done = worker.do(task, lambda share, what: check_stop(stop), tell)
        except Stopped:
            return
        put_done(run.path, done)
        for cell, error in done.failed[:20]:
            log.tell("failed", cell=cell, shard=task.shard, error=error)
        numbers = {"cells": len(done.ids), "failed": len(done.failed), "seconds": round(done.seconds, 3), "attempt": task.attempt}
        log.tell("shard", shard=task.shard, worker=name, **numbers)


def _end_if_last(run: Run) -> None:
    """Write into the record how the run went and who did it, unless another part still works, which then does."""
    with contextlib.suppress(RefusedError), Lock(run.path / "run.lock"):
        run = run.refresh()
        counts = run.counts
        entry = run.provenance[-1]
        for event in run.events():
            if event["kind"] == "worker" and "models" in event:
                entry.setdefault("models", event["models"])
                if event["machine"] not in entry.setdefault("machines", []):
                    entry["machines"].append(event["machine"])
        status = "stopped" if counts["waiting"] else "partial" if counts["failed"] else "done"
        write_record(run.path, {**run.record, "status": status, "counts": counts})
        if not counts["waiting"]:
            compact(run)


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """Inside, signals end the work after the shard under way; the second at once. Only the main thread hears them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    before: dict[int, Any] = {number: signal.signal(number, lambda number, _: stop(number)) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
