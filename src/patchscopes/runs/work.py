"""The work: what a process that has the models does with a shard.

A cell that fails does not take the others with it: where a group fails, its halves are tried, down to the cell that does. Rows come
back as the bytes of a Parquet file, the same wherever they were computed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save

from patchscopes.core.errors import PatchscopesError, ResourceError
from patchscopes.experiment.looks import looks
from patchscopes.experiment.spec import Outputs
from patchscopes.runs.conditions import Conditions, conditions, files_of, keys, load_spec, machine
from patchscopes.runs.folder import as_parquet, failed, skipped
from patchscopes.runs.plan import Seen, see
from patchscopes.runs.tasks import EVERY, Done, Job, Report, Stopped, Task, Tell
from patchscopes.scopes.cells import Cell
from patchscopes.scopes.viewing import Outcome

__all__ = ["EVERY", "Done", "Job", "Report", "Stopped", "Task", "Tell", "Worker"]


class Worker:
    """A process with loaded models."""

    def __init__(self, seen: Sequence[Seen], outputs: Outputs, found: Conditions):
        self.seen, self.outputs, self.conditions = seen, outputs, found

    @classmethod
    def of(cls, job: Job, device: str | None = None) -> Worker:
        """Load what the job needs."""
        experiment = job.experiment
        specs = {spec.key: spec for spec in experiment.models()}
        models = {key: load_spec(spec, device) for key, spec in specs.items()}
        some = next(iter(models.values()))
        found = conditions(models, {key: files_of(spec) for key, spec in specs.items()}, str(some.device))
        return cls(see(looks(experiment, models)[0], keys(found)), experiment.outputs, found)

    @property
    def about(self) -> dict[str, Any]:
        """Conditions, and the full provenance of models and machine."""
        models = {}
        for one in self.seen:
            for name, model in ((one.look.model, one.viewing.origin), (one.look.target_model, one.viewing.target_model)):
                models.setdefault(name, model.provenance())
        return {"conditions": self.conditions, "models": models, "machine": machine()}

    def do(self, task: Task, report: Report = lambda share, what: None, tell: Tell = lambda message: None) -> Done:
        """Read the task's cells. What `report` raises ends it."""
        started = time.monotonic()
        one = self.seen[task.look]
        cells = [one.viewing.cells[k] for k in task.cells]
        with _hearing(tell):
            outcomes = list(self._read(one, cells, _Share(report, bool(one.look.controls))))
        rows = [row for outcome in outcomes for row in _rows(one, outcome, task)]
        return Done(
            task,
            as_parquet(rows),
            self._tensors(one, outcomes),
            tuple(row["cell"] for row in rows),
            tuple((row["cell"], row["error"]) for row in rows if row["status"] == "failed"),
            time.monotonic() - started,
        )

    def _read(self, one: Seen, cells: list[Cell], share: _Share) -> Iterator[Outcome]:
        try:
            yield from one.viewing.read(cells, keep_logits=self.outputs.logits, top_k=self.outputs.top_k, progress=share)
        except Stopped:
            raise
        except (PatchscopesError, RuntimeError, ValueError, MemoryError) as error:  # a model's own code may raise any of these
            if _is_lost(error):
                raise ResourceError(f"the device is lost: {str(error).splitlines()[0]}") from error
            if len(cells) == 1:
                told = error if isinstance(error, PatchscopesError) else PatchscopesError(f"{type(error).__name__}: {error}")
                yield Outcome(cells[0], [], error=told)
                return
            for half in (cells[: len(cells) // 2], cells[len(cells) // 2 :]):
                yield from self._read(one, half, share)

    def _tensors(self, one: Seen, outcomes: Sequence[Outcome]) -> bytes | None:
        found: dict[str, torch.Tensor] = {}
        about: dict[str, Any] = {}
        if self.outputs.logits and (kept := [t for outcome in outcomes for t in outcome.logits or ()]):
            found["logits"] = torch.stack(kept)
            ids = [one.cell_id(outcome.cell, row["control"]) for outcome in outcomes for row in outcome.rows]
            about["logits"] = {"axes": ["cell", "vocab"], "cells": ids}
        if self.outputs.vectors:
            places = dict.fromkeys((o.cell.place, o.cell.source_layer) for o in outcomes)
            one.viewing.sight.need({place for place, _ in places})
            found["vectors"] = torch.stack([one.viewing.sight.vector(*place).cpu() for place in places])
            named = [{**one.heading, **_place(one, *place)} for place in places]
            about["vectors"] = {"axes": ["state", "d_model"], "states": named}
        return save(found, {"about": json.dumps(about)}) if found else None


class _Share:
    """Turns the progress of a reading into the share of a task that is done, now and then."""

    def __init__(self, report: Report, controls: bool):
        self.report, self.controls, self.last = report, controls, 0.0

    def __call__(self, done: int, of: int, what: str) -> None:
        part = done / max(of, 1)
        halves = {"generating": 0.5 * part, "weighing evidence": 0.5 + 0.5 * part} if self.controls else {"generating": part}
        self.report(halves.get(what, 0.0), what)


def _place(one: Seen, place: int, layer: int) -> dict[str, Any]:
    where = one.viewing.places[place]
    return {"prompt": one.look.numbers[one.viewing.prompts[place]], "position": where.position, "source_layer": layer}


def _rows(one: Seen, outcome: Outcome, task: Task) -> Iterator[dict[str, Any]]:
    """A row for every cell that was planned: what was read, or why not."""
    cell = outcome.cell
    where = {**one.coordinates(cell), "attempt": task.attempt, "provenance": task.provenance}
    found = {row["control"]: row for row in outcome.rows}
    for kind in one.viewing.kinds(cell):
        head = {**where, "cell": one.cell_id(cell, kind), "control": kind}
        if outcome.error is not None:
            yield {**head, **(failed(str(outcome.error)) if kind == "none" else skipped())}
        elif (row := found.get(kind)) is None:
            yield {**head, **skipped(outcome.absent[kind])}
        elif math.isnan(row["logprob"]):
            yield {**row, **head, **failed("the logits of the patched run are not finite (NaN or infinity)")}
        else:
            yield {**row, **head, "status": "ok", "error": None}


def _is_lost(error: BaseException) -> bool:
    """Whether the device answers no more, so that nothing after it would work."""
    text = str(error)
    return (
        isinstance(error, RuntimeError) and ("CUDA error" in text or "device-side assert" in text) and "out of memory" not in text
    )


@contextmanager
def _hearing(tell: Tell) -> Iterator[None]:
    """Inside, what the engine warns of (less at a time for want of memory) is told."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(record.getMessage())

    log, ear = logging.getLogger("patchscopes.engine"), Ear(logging.WARNING)
    log.addHandler(ear)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(ear)
        log.propagate = before
