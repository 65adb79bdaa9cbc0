"""Drive an executor: record what workers finish, tell what happens, and say at the end how it went."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import polars as pl

from patchscopes.core.errors import RefusedError, ResourceError
from patchscopes.runs.conditions import differences
from patchscopes.runs.events import EventLog
from patchscopes.runs.executor import DEATHS, Executor, Finished, Lost, Message, Ready, Stop, Told, Working
from patchscopes.runs.folder import Run, as_parquet, compact, failed, put_piece, skipped, write_record
from patchscopes.runs.pace import Pace
from patchscopes.runs.tasks import Done, Job, Task

LIVE, KEPT = 0.5, 10.0  # seconds between progress events: for those who watch, and in the file


def drive(run: Run, tasks: Sequence[Task], executor: Executor, log: EventLog, stop: Stop, *, alone: bool = True) -> Run:
    """Have `tasks` done; the run as it is then. Errors of disk and memory are raised after the record says that it was stopped.
    alone: nobody else works on the run; else run.json is left as it is (see `parts`)."""
    driving = _Driving(run, tasks, log, stop, alone)
    driving.record["status"] = "running"
    driving.write()
    log.tell("started", run=run.id, shards=len(tasks), cells=driving.todo, workers=executor.workers, executor=executor.name)
    ending = "stopped"
    try:
        with _signals(stop, alone):
            if tasks:
                executor.run(Job(run.spec, str(run.path)), tasks, driving.hear, stop)
        ending = "done"
    finally:
        with contextlib.suppress(OSError, ResourceError):  # a full disk: the record then says "running", which reads as stopped
            found = run.refresh()
            counts = found.counts
            if alone:
                ending = close(found)
            elif stop.asked:
                ending = "stopped"
            log.tell(ending if ending == "stopped" else "done", run=run.id, status=ending, counts=counts)
    return run.refresh()


def close(run: Run) -> str:
    """Write into the record how the work went; its status."""
    counts = run.counts
    status = "stopped" if counts["waiting"] else "partial" if counts["failed"] else "done"
    if not counts["waiting"]:
        compact(run)
    write_record(run.path, {**run.record, "status": status, "counts": counts})
    return status


class _Driving:
    """What is known of the work under way."""

    def __init__(self, run: Run, tasks: Sequence[Task], log: EventLog, stop: Stop, alone: bool):
        self.run, self.log, self.stop, self.alone = run, log, stop, alone
        self.stopping = False
        self.record: dict[str, Any] = run.record
        per_shard = run.plan.group_by("shard", "look").agg(pl.col("cost").sum(), pl.len(), pl.col("cell"))
        costs = {(shard, look): (cost, n, set(cells)) for shard, look, cost, n, cells in per_shard.iter_rows()}
        readings = dict(run.plan.filter(pl.col("control") == "none").group_by("shard").len().iter_rows())
        share = {task.shard: len(task.cells) / max(readings.get(task.shard, 1), 1) for task in tasks}
        self.ids = {task.shard: costs[task.shard, task.look][2] for task in tasks}
        self.todo = round(sum(costs[task.shard, task.look][1] * share[task.shard] for task in tasks))
        self.pace = Pace(
            {task.shard: costs[task.shard, task.look][0] * share[task.shard] for task in tasks},
            {task.shard: task.look for task in tasks},
        )
        counts = run.counts
        self.before = counts["ok"] + counts["failed"] + counts["skipped"] if alone else 0
        self.cells = run.cells if alone else self.todo
        self.done = self.failed = 0
        self.told: float = time.monotonic()
        self.kept: float = self.told

    def write(self) -> None:
        """The record, if it is this process that writes it."""
        if self.alone:
            write_record(self.run.path, self.record)

    def hear(self, message: Message) -> None:
        """What a worker says."""
        if self.stop.asked and not self.stopping:
            self.stopping = True
            self.log.tell("stopping", message="stopping after the shards under way; once more to stop at once")
        match message:
            case Ready(worker, about):
                self._admit(worker, about)
            case Working(_, shard, share, what):
                self.pace.working(shard, share)
                self._progress(what)
            case Finished(worker, done):
                self._record(worker, done)
            case Told(worker, text, kind):
                self.log.tell(kind, worker=worker, message=text)
            case Lost(worker, reason, task, given_up):
                shard = None if task is None else task.shard
                self.log.tell("worker", worker=worker, state="lost", message=reason, shard=shard, given_up=given_up)
                if task is not None and given_up:
                    self._give_up(worker, task, reason)

    def _admit(self, worker: str, about: dict[str, Any]) -> None:
        """RefusedError if a worker computes under other conditions than the run."""
        entry = self.record["provenance"][-1]
        if changed := differences(entry["conditions"], about["conditions"]):
            raise RefusedError(
                f"the worker {worker} computes under other conditions than this run: {'; '.join(changed)}. Give workers the same versions, "
                "and say device and dtype in the experiment where machines differ"
            )
        add_about(entry, about)
        self.write()
        self.pace.start()
        device = next(iter(about["models"].values()))["device"]
        told: dict[str, Any] = {"worker": worker, "state": "ready", "device": device, "machine": about["machine"]["host"]}
        if not self.alone:  # for the record, later
            told["about"] = {"models": about["models"], "machine": about["machine"]}
        self.log.tell("worker", **told)

    def _record(self, worker: str, finished: Done) -> None:
        task = finished.task
        if strange := set(finished.ids) - self.ids[task.shard]:
            raise RefusedError(
                f"the worker {worker} computed {len(strange)} cells that are not of shard {task.shard}: its models or files are others"
            )
        if finished.tensors is not None:  # first: rows say that all is there
            put_piece(self.run.path, task.shard, task.attempt, finished.tensors, tensors=True)
        put_piece(self.run.path, task.shard, task.attempt, finished.rows)
        self.done += len(finished.ids)
        self.failed += len(finished.failed)
        self.pace.finished(task.shard, finished.seconds)
        for cell, error in finished.failed[:20]:
            self.log.tell("failed", cell=cell, shard=task.shard, error=error)
        self.log.tell(
            "shard",
            shard=task.shard,
            worker=worker,
            cells=len(finished.ids),
            failed=len(finished.failed),
            seconds=round(finished.seconds, 3),
            attempt=task.attempt,
        )
        self._progress("reading", at_once=True)

    def _give_up(self, worker: str, task: Task, reason: str) -> None:
        """Record the readings of a task that workers die of as failed."""
        kept = self.run.finished.filter(pl.col("status") != "failed")
        here = self.run.plan.filter(pl.col("look") == task.look, pl.col("index").is_in(task.cells))
        error = f"given up: {DEATHS} workers died at it, the last of {reason}"
        common = {"attempt": task.attempt, "provenance": task.provenance}
        rows = [
            {**row, **common, **(failed(error) if row["control"] == "none" else skipped())}
            for row in here.join(kept, on="cell", how="anti").iter_rows(named=True)
        ]
        self.pace.left.pop(task.shard, None)  # how long it took says nothing of others
        bad = tuple((row["cell"], error) for row in rows if row["status"] == "failed")
        self._record(worker, Done(task, as_parquet(rows), None, tuple(row["cell"] for row in rows), bad, 0.0))

    def _progress(self, what: str, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self.told < LIVE:
            return
        self.told = now
        if kept := now - self.kept >= KEPT:
            self.kept = now
        passed = max(now - (self.pace.begun or now), 1e-9)
        eta = self.pace.eta()
        self.log.tell(
            "progress",
            kept=kept,
            done=self.before + self.done,
            cells=self.cells,
            share=round(self.pace.share, 4),
            failed=self.failed,
            rate=round(self.done / passed, 1),
            eta=None if eta is None else [round(t, 1) for t in eta],
            what=what,
        )


def add_about(entry: dict[str, Any], about: dict[str, Any]) -> None:
    """Into an entry of the provenance: models, and another machine."""
    entry.setdefault("models", about["models"])
    if about["machine"] not in entry.setdefault("machines", []):
        entry["machines"].append(about["machine"])


@contextlib.contextmanager
def _signals(stop: Stop, alone: bool) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM end the work: once after the shards under way, twice at once; for schedulers' sake SIGUSR1 too, which
    they send some time before. Only the main thread hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _frame: FrameType | None) -> None:
        stop(number)
        if stop.now:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if not alone and hasattr(signal, "SIGUSR1"):
        numbers.append(signal.SIGUSR1)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        if not stop.now:
            raise
    finally:
        for number, old in before.items():
            signal.signal(number, old)
