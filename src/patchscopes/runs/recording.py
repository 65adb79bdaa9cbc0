"""Runs that survive: make one of an experiment, go on with one that was stopped, try failed cells again.

    experiment → plan → shards → executor → rows in the run folder

What was finished is never computed again, however the process ended: rows are recorded a shard at a time, whole or not at all, and what
is left is the plan without them. Models, number formats and versions that changed meanwhile are not mixed in silently.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from patchscopes.core.errors import InputError, RefusedError
from patchscopes.core.files import make_folder
from patchscopes.experiment.resolve import resolved, with_inputs
from patchscopes.experiment.spec import Experiment
from patchscopes.runs.conditions import Conditions, conditions, differences, files_of, keys, outline_spec, versions
from patchscopes.runs.drive import drive
from patchscopes.runs.events import EventLog, Listener
from patchscopes.runs.executor import Executor, Stop
from patchscopes.runs.folder import (
    SCHEMA_VERSION,
    Run,
    open_run,
    run_folders,
    set_aside,
    write_piece,
    write_record,
    write_table,
)
from patchscopes.runs.here import Here
from patchscopes.runs.lock import Lock
from patchscopes.runs.schema import ROWS
from patchscopes.runs.tasks import Job, Task

if TYPE_CHECKING:
    from patchscopes.model import Model
    from patchscopes.runs.plan import Seen
    from patchscopes.runs.work import Worker

OnChange = Literal["refuse", "mark", "new"]


def sweep(
    experiment: Experiment | Mapping[str, Any] | str | Path,
    *,
    runs: str | Path = "runs",
    folder: str | Path | None = None,
    models: Mapping[str, Model] | None = None,
    executor: Executor | None = None,
    new: bool = False,
    on_change: OnChange = "refuse",
    listeners: Sequence[Listener] = (),
    stop: Stop | None = None,
    work: bool = True,
) -> Run:
    """Record an experiment as a run. The same experiment again: what was finished is there at once, the rest is gone on with.

    runs       where run folders are; `folder`: this very one
    models     loaded models, by what the experiment calls them, instead of its own; only for work in this process
    executor   who works: `Here()` (default), `Processes(…)`, `OnRay(…)`
    new        a new run, whatever is there, that takes nothing over
    listeners  hear every event (see `events`)
    work       False: plan only, for parts that others do (see `parts`); `executor` says on what kind of device

    Ctrl-C once ends it after the shards under way, twice at once; the run can be resumed. InputError, NotAvailableError, RefusedError
    before anything is made; ResourceError if disk or memory do not do, what was finished being safe.
    """
    experiment = _experiment(experiment)
    executor = executor or Here()
    question = None if models else _question(experiment, executor)
    if not new and question is not None and (same := _same(question, Path(runs), folder)) is not None:
        if same.status in ("done", "partial"):
            for listener in listeners:
                listener({"seq": 0, "time": "", "kind": "cached", "run": same.id, "cells": same.cells, "folder": str(same.path)})
            return same
        if not work:
            return same
        return resume(same.path, executor=executor, on_change=on_change, listeners=listeners, stop=stop)
    asked = resolved(experiment)
    worker, seen, found, caveats = _prepared(asked, models, executor)
    table, more = _planned(seen, asked, executor)
    path = Path(folder) if folder is not None else _new_folder(Path(runs), asked.name, question or str(found))
    if (path / "run.json").exists():
        raise RefusedError(f"{str(path)!r} holds another run; give another folder, or none")
    make_folder(path)
    with Lock(path / "run.lock"):
        make_folder(path / "shards")
        record = {
            "schema_version": SCHEMA_VERSION,
            "id": path.name.rpartition("_")[2],
            "name": asked.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": "planned",
            "cells": len(table),
            "shards": int(table["shard"].max()) + 1 if len(table) else 0,  # type: ignore[arg-type]
            "question": question,
            "digest": experiment.digest,
            "spec": with_inputs(asked, path),
            "looks": [_described(one) for one in seen],
            "provenance": [{"conditions": found}],
            "caveats": [*caveats, *more],
        }
        write_table(path / "plan.parquet", table)
        write_table(path / "prompts.parquet", _prompts(seen))
        write_record(path, record)
        with contextlib.closing(EventLog(path / "events.jsonl", tuple(listeners))) as log:
            kept = asked.outputs.vectors or asked.outputs.logits  # those of other runs lie in their folders
            cached = 0 if new or kept else _bring(path, Path(runs), table, found, log)
            log.tell("planned", run=record["id"], folder=str(path), cells=len(table), shards=record["shards"], cached=cached)
            if not work:
                return Run(path)
            here = Here(worker=worker) if worker is not None else executor
            return _go_on(path, here, log, stop or Stop())


def resume(
    which: str | Path,
    *,
    runs: str | Path = "runs",
    models: Mapping[str, Model] | None = None,
    executor: Executor | None = None,
    on_change: OnChange = "refuse",
    failed: bool = False,
    listeners: Sequence[Listener] = (),
    stop: Stop | None = None,
) -> Run:
    """Go on with a run: exactly the cells without a finished row; damaged files count as unfinished.

    on_change  if models, number format or versions are no longer those of the run: "refuse", "mark" (its new rows say so in their
               column `provenance`; not if models or number format differ, since their cells are other cells), or "new" (a new run)
    failed     try failed cells again, too
    """
    run = open_run(which, runs=runs)
    executor = executor or Here()
    if run.is_old:
        raise RefusedError(f"{str(run.path)!r} was written by an older version and is complete; there is nothing to resume")
    with Lock(run.path / "run.lock"):
        run = run.refresh()
        for piece in run.damaged:
            set_aside(piece)
        experiment = Job(run.spec, str(run.path)).experiment
        worker, _, found, _ = _prepared(experiment, models, executor)
        record = run.record
        changed = differences(record["provenance"][-1]["conditions"], found)
        if changed and on_change == "refuse":
            told = "\n".join(f"  {line}" for line in changed)
            raise RefusedError(
                f"the run {run.id} was computed under other conditions:\n{told}\nNothing was computed. Restore them; or go on with rows "
                "that are marked (--on-change mark); or begin a new run (--on-change new)"
            )
        if changed and on_change == "mark":
            if keys(found) != keys(record["provenance"][-1]["conditions"]):
                raise RefusedError(
                    f"the run {run.id} cannot go on: its models or their number format changed ({'; '.join(changed)}), so that its cells "
                    "would be other cells. Begin a new run (--on-change new)"
                )
            record["provenance"].append({"conditions": found})
            record["caveats"].append(f"rows of provenance {len(record['provenance']) - 1}: {'; '.join(changed)}")
            write_record(run.path, record)
        if not changed or on_change == "mark":
            with contextlib.closing(EventLog(run.path / "events.jsonl", tuple(listeners))) as log:
                for piece in run.damaged:
                    log.tell("note", message=f"{piece.path.name} was damaged; its cells are computed again")
                here = Here(worker=worker) if worker is not None else executor
                return _go_on(run.path, here, log, stop or Stop(), failed=failed)
    return sweep(experiment, runs=run.path.parent, models=models, executor=executor, new=True, listeners=listeners, stop=stop)


def _experiment(given: Experiment | Mapping[str, Any] | str | Path) -> Experiment:
    if isinstance(given, Experiment):
        return given
    return Experiment.load(given) if isinstance(given, (str, Path)) else Experiment.said(given, "experiment")


# ---------------------------------------------------------------------------------------------------------- preparing


def _question(experiment: Experiment, executor: Executor) -> str:
    """A hash of everything that can be known of an experiment without loading anything: a finished run of it is its answer."""
    files = {spec.key: files_of(spec) for spec in experiment.models()}
    asked = json.dumps([experiment.digest, files, versions(), getattr(executor, "asked", None)], sort_keys=True)
    return hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()


def _same(question: str, runs: Path, folder: str | Path | None) -> Run | None:
    """The latest run that asked the same."""
    for path in [Path(folder)] if folder is not None else run_folders(runs):
        if (path / "run.json").exists() and json.loads((path / "run.json").read_text()).get("question") == question:
            return Run(path)
    return None


def _prepared(
    experiment: Experiment, models: Mapping[str, Model] | None, executor: Executor
) -> tuple[Worker | None, list[Seen], Conditions, list[str]]:
    """The looks of an experiment under the conditions of its workers: with loaded models in this process, else with outlines."""
    from patchscopes.experiment.looks import looks
    from patchscopes.runs.conditions import load_spec
    from patchscopes.runs.plan import see
    from patchscopes.runs.work import Worker

    specs = {spec.key: spec for spec in experiment.models()}
    here = executor if isinstance(executor, Here) else None
    if models is not None:
        if here is None:
            raise InputError(
                "models given as objects work in this process only; name them in the experiment, or leave the executor out"
            )
        if unknown := sorted(specs.keys() - models.keys()):
            raise InputError(f"the experiment reads {', '.join(unknown)}; expected each in models=…, found {', '.join(models)}")
        loaded = {key: models[key] for key in specs}
        files = {key: _weights(model) for key, model in loaded.items()}
    else:
        loaded = {
            key: load_spec(spec, here.asked) if here is not None else outline_spec(spec, executor.device)
            for key, spec in specs.items()
        }
        files = {key: files_of(spec) for key, spec in specs.items()}
    device = str(next(iter(loaded.values())).device) if here is not None else executor.device
    found = conditions(loaded, files, device)
    looked, caveats = looks(experiment, loaded)
    seen = see(looked, keys(found))
    return (Worker(seen, experiment.outputs, found) if here is not None else None), seen, found, caveats


def _weights(model: Model) -> str:
    """A hash of the weights as they are now."""
    model.__dict__.pop("weight_hash", None)  # they may have changed since it was taken
    return model.weight_hash


def _planned(seen: Sequence[Seen], experiment: Experiment, executor: Executor) -> tuple[pl.DataFrame, list[str]]:
    from patchscopes.runs.estimate import costs_of
    from patchscopes.runs.plan import plan

    return plan(seen, costs_of(seen), shard=experiment.shard, device=executor.device)


def _described(one: Seen) -> dict[str, Any]:
    """What is recorded of a look, beside its prompts."""
    return {
        **one.heading,
        "target_model": one.look.target_model,
        "controls": one.look.controls,
        "provenance": one.viewing.settings(),
    }


def _prompts(seen: Sequence[Seen]) -> pl.DataFrame:
    """part, model, prompt, its text and token ids, and the labels that came with it."""
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for one in seen:
        for place, k in zip(one.viewing.places, one.viewing.prompts, strict=True):
            key = (one.look.part, one.look.model, one.look.numbers[k])
            if key not in rows:
                ids = list(place.tokens.ids) if place.tokens is not None else None
                rows[key] = {
                    "part": key[0],
                    "model": key[1],
                    "prompt": key[2],
                    "prompt_text": place.text,
                    "ids": ids,
                    **{name if name not in ROWS else f"label_{name}": value for name, value in one.look.labels[k].items()},
                }
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return pl.DataFrame({name: [row.get(name) for row in rows.values()] for name in names}, strict=False)


def _new_folder(runs: Path, name: str, question: str) -> Path:
    """2026-11-20_name_7f3c: a folder that is not there yet."""
    slug = re.sub(r"[^\w.-]+", "-", name).strip("-._") or "sweep"
    taken = {path.name.rpartition("_")[2] for path in run_folders(runs)}
    digits = hashlib.blake2b(f"{question} {secrets.token_hex(8)}".encode(), digest_size=16).hexdigest()
    length = next(n for n in range(4, 33) if digits[:n] not in taken)
    return runs / f"{datetime.now(UTC):%Y-%m-%d}_{slug}_{digits[:length]}"


# --------------------------------------------------------------------------------------------------------------- doing


def _bring(path: Path, runs: Path, table: pl.DataFrame, found: Conditions, log: EventLog) -> int:
    """Take over rows of cells that earlier runs below `runs` finished under the same conditions; how many."""
    from patchscopes.runs.schema import COORDINATES, RESULTS

    wanted = table.select("cell", "look", "index")
    sizes = wanted.group_by("look", "index").len("size")
    brought = 0
    for other in run_folders(runs):
        if other == path or not len(wanted):
            continue
        run = Run(other)
        numbers = [k for k, entry in enumerate(run.provenance) if not differences(entry.get("conditions", {}), found)]
        if not numbers:
            continue
        rows = run.scan().filter(pl.col("provenance").is_in(numbers)).select("cell", *RESULTS)
        rows = rows.join(wanted.lazy(), on="cell").collect()
        # whole readings only: what is left of one would be made with all of its controls
        whole = rows.group_by("look", "index").agg(pl.len().alias("there"), (pl.col("status") == "failed").any().alias("failed"))
        whole = whole.join(sizes, on=["look", "index"]).filter((pl.col("there") == pl.col("size")) & ~pl.col("failed"))
        rows = rows.join(whole, on=["look", "index"], how="semi")
        if len(rows):
            rows = rows.drop("look", "index").with_columns(attempt=pl.lit(0, pl.Int32), provenance=pl.lit(0, pl.Int32))
            rows = rows.join(table.select(*COORDINATES), on="cell").select(*ROWS)
            write_piece(path, int(table["shard"].max()) + 1 + brought, 0, rows)  # type: ignore[arg-type]
            wanted = wanted.join(rows.select("cell"), on="cell", how="anti")
            brought += len(rows)
            log.tell("note", message=f"{len(rows):,} cells are taken from the run {run.id}")
    return brought


def _go_on(path: Path, executor: Executor, log: EventLog, stop: Stop, *, failed: bool = False) -> Run:
    """Do what is left of a run."""
    run = Run(path)
    tasks = tasks_left(run, failed=failed)
    return drive(run, tasks, executor, log, stop)


def tasks_left(run: Run, *, failed: bool = False) -> list[Task]:
    """What is to be done: the readings of every shard without a finished row, and those that failed if they are to be tried again.
    The tasks of all looks take turns, so that how long each takes is known early."""
    finished = run.finished
    if failed:
        again = finished.filter(pl.col("status") == "failed").select("cell")
        bad = run.plan.join(again, on="cell", how="semi").select("look", "index").unique()
        redo = run.plan.join(bad, on=["look", "index"], how="semi")
        attempts = redo.join(finished, on="cell", how="left").group_by("look", "index").agg(pl.col("attempt").max() + 1)
        finished = finished.join(redo.select("cell"), on="cell", how="anti")
    else:
        attempts = None
    left = run.plan.join(finished, on="cell", how="anti").select("shard", "look", "index").unique(maintain_order=True)
    left = left.with_columns(attempt=pl.lit(0, pl.Int32))
    if attempts is not None and len(attempts):
        left = left.drop("attempt").join(attempts, on=["look", "index"], how="left", maintain_order="left").fill_null(0)
    number = len(run.provenance) - 1
    tasks = [
        Task(shard, look, tuple(cells), attempt, number)
        for shard, look, attempt, cells in left.group_by("shard", "look", "attempt", maintain_order=True).agg("index").iter_rows()
    ]
    of_look: dict[int, int] = {}
    place = {}
    for task in tasks:
        place[task] = of_look[task.look] = of_look.get(task.look, -1) + 1
    return sorted(tasks, key=lambda task: (place[task] / (of_look[task.look] + 1), task.look))
