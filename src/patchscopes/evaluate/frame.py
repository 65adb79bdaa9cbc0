"""What all experiments share: what is asked for, how it is recorded, what comes out.

An experiment is a module with

    TITLE, PAPER     a line for people, and whom to cite
    Settings         a frozen dataclass: every choice as a field. Its default is the paper's, unless `paper` names that or `ours` says
                     that the paper has no such choice
    plan(asked, settings)      the experiments that it will run, as far as they are known before anything has run
    evaluate(asked, settings)  → Result

`evaluate` makes an `Experiment` (a part for each relation, say), has it `recorded`, and scores `run.table()` with pure functions. So it
is planned, resumed and distributed like any sweep, and asking again is instant. Nothing here needs a loaded model.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from patchscopes.core.errors import InputError, PatchscopesError, UnknownName, nearest

if TYPE_CHECKING:
    from patchscopes.evaluate.statistics import Estimate
    from patchscopes.experiment import Experiment
    from patchscopes.experiment.spec_tables import ModelSpec
    from patchscopes.model import Model
    from patchscopes.runs import Executor, Run, Stop
    from patchscopes.runs.events import Listener

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What an experiment is to be done with.

    model      a bundled model, a folder, a Hugging Face id, or a table of an experiment file (name, revision, dtype, device, …)
    data       a file or folder in one of the public formats; None: the facts of the bundled model
    n          so many items of each relation, or in all where there are none; None: as many as the experiment's default
    quick      fewer still: a look at whether it works
    runs       where run folders are
    executor, listeners, stop    as `sweep` takes them
    models     loaded models by name, instead of the model's own; then nothing is remembered between calls
    """

    model: str | Mapping[str, Any] = "atlas"
    data: Path | None = None
    n: int | None = None
    seed: int = 0
    quick: bool = False
    runs: Path = Path("runs")
    executor: Executor | None = None
    listeners: Sequence[Listener] = ()
    stop: Stop | None = None
    models: Mapping[str, Model] | None = None

    @property
    def spec(self) -> ModelSpec:
        """The model as an experiment has it."""
        from patchscopes.experiment.spec import Experiment

        return Experiment.model_validate({"model": self.model, "prompts": "x"}).model[0]

    def items(self, default: int, quick: int) -> int:
        """How many: what was asked for, else the default, or that of a quick look."""
        return self.n if self.n is not None else quick if self.quick else default


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure or a claim. rows: texts and numbers; a column of `shares` is shown as per cent."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    shares: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """A line of a figure: y over x, with an interval where there is one."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False  # a control or a baseline


@dataclass(frozen=True)
class Lines:
    """A figure of lines, such as precision by layer."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """A figure of bars: for each label one bar of each series (value, low, high)."""

    name: str
    title: str
    y_label: str
    labels: tuple[str, ...]
    series: tuple[tuple[str, tuple[Estimate | None, ...]], ...]


@dataclass(frozen=True)
class Heat:
    """A heat map: values[row][column], such as source layer × target layer; NaN where there is nothing."""

    name: str
    title: str
    row_label: str
    column_label: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    label: str
    marked: tuple[int, int] | None = None  # (row, column) of a cell that was chosen


Figure = Lines | Bars | Heat


@dataclass(frozen=True)
class Result:
    """What came out.

    claims      what may be said, in plain words, the strongest first
    scores      all figures as plain JSON
    headline    the few figures for a terminal: name → Estimate, number or text
    deviations  where this differs from the paper, with the setting that does it
    caveats     what a reader must know
    runs        the recorded runs behind it, in order
    """

    name: str
    title: str
    paper: str
    claims: tuple[str, ...]
    headline: Mapping[str, Any]
    scores: Mapping[str, Any]
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One JSON document: figures, settings, caveats, and where they come from."""
        return {
            "experiment": self.name,
            "title": self.title,
            "paper": self.paper,
            "claims": list(self.claims),
            "scores": {key: _plain(value) for key, value in self.scores.items()},
            "settings": _plain(dict(self.settings)),
            "deviations": list(self.deviations),
            "caveats": list(self.caveats),
            "tables": [
                {
                    "name": t.name,
                    "caption": t.caption,
                    "columns": list(t.columns),
                    "rows": [list(map(_plain, row)) for row in t.rows],
                }
                for t in self.tables
            ],
            "runs": [provenance(run) for run in self.runs],
        }


class Unfinished(PatchscopesError):
    """The run of an experiment was stopped; the same call goes on with it."""

    def __init__(self, run: Run, signal: int | None):
        self.run, self.signal = run, signal
        self.exit_code = 143 if signal == 15 else 130
        done = run.cells - run.counts["waiting"]
        super().__init__(
            f"stopped: {done:,} of {run.cells:,} cells of the run {run.id} are done. The same command goes on from there"
        )


def recorded(asked: Asked, experiment: Experiment) -> Run:
    """The finished run of an experiment, made or gone on with below `asked.runs`. Unfinished if it was stopped."""
    from patchscopes.runs.executor import Stop
    from patchscopes.runs.recording import sweep

    stop = asked.stop or Stop()
    run = sweep(experiment, runs=asked.runs, models=asked.models, executor=asked.executor, listeners=asked.listeners, stop=stop)
    if run.counts["waiting"]:
        raise Unfinished(run, stop.signal)
    return run


def caveats_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """What readers of these runs must know: their own caveats, and cells that failed."""
    found = [caveat for run in runs for caveat in run.caveats]
    for run in runs:
        if failed := run.counts["failed"]:
            found.append(f"{failed:,} of {run.cells:,} cells of the run {run.id} failed; they count as misses")
    return tuple(dict.fromkeys(found))


def provenance(run: Run) -> dict[str, Any]:
    """Where figures come from: the run, what it was asked, under which conditions."""
    return {
        "id": run.id,
        "name": run.name,
        "folder": run.path.name,
        "digest": run.record.get("digest"),
        "cells": run.cells,
        "counts": run.counts,
        "created": run.record.get("created"),
        "conditions": [entry.get("conditions") for entry in run.provenance],
    }


def chosen_settings(kind: type[T], given: Mapping[str, str]) -> T:
    """The settings of an experiment with some given as text (tokens=20, cells=1:8). UnknownName, InputError."""
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]  # a dataclass
    found: dict[str, Any] = {}
    for name, text in given.items():
        if (key := name.replace("-", "_")) not in known:
            raise UnknownName(f"unknown setting {name!r}. {nearest(key, known)}")
        found[key] = _of_text(name, text, hints[key])
    return kind(**found)


def paper(default: T, value: Any) -> T:
    """A field of `Settings` whose default is not what the paper has: `value`, or what to call it."""
    return field(default=default, metadata={"paper": value})


def ours(default: T) -> T:
    """A field of `Settings` that is no choice of the paper: whatever it is, nothing differs from the paper."""
    return field(default=default, metadata={"ours": True})


def settings_of(settings: Any, asked: Asked) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(all settings as plain JSON, what differs from the paper's as sentences, defaults among it)."""
    own = dataclasses.asdict(settings)
    changed = [
        f"{f.name} = {own[f.name]!r} instead of {theirs!r}"
        for f in dataclasses.fields(settings)
        if "ours" not in f.metadata and getattr(settings, f.name) != (theirs := f.metadata.get("paper", f.default))
    ]
    own |= {"model": asked.spec.key, "data": None if asked.data is None else Path(asked.data).name, "n": asked.n}
    own |= {"seed": asked.seed, "quick": asked.quick}
    return own, tuple(changed)


def _of_text(name: str, text: str, kind: Any) -> Any:
    options = [one for one in typing.get_args(kind) if one is not type(None)] if _is_union(kind) else [kind]
    if _is_union(kind) and text in ("", "none"):
        return None
    kind = options[0]
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise UnknownName(f"unknown {name} {text!r}. {nearest(text, typing.get_args(kind))}")
        return text
    if typing.get_origin(kind) is tuple:
        each = typing.get_args(kind)[0]
        return tuple(_of_text(name, part.strip(), each) for part in text.split(",") if part.strip())
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")
        raise InputError(f"the setting {name} is {text!r}; expected {expected}") from None


def _is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else str(value) if isinstance(value, Path) else value
