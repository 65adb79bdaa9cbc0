"""What recording costs: runs against the bare engine, on the bundled model.

recorded / bare       a sweep of 10,000 readings with its folder, against one call of the scope on the same sources
two workers           the same sweep by one process and by two, start-up left out: how many times faster
foreseen / passed     the time that was foreseen after a tenth of the work, against what it took
opening               a run of 1.6 million rows opened and one layer of it read, in seconds
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from patchscopes.bench.report import Figure
from patchscopes.bench.turns import Progress
from patchscopes.experiment.looks import looks
from patchscopes.experiment.spec import Experiment
from patchscopes.model.loading import load
from patchscopes.organisms.atlas.facts import world
from patchscopes.runs.executor import Executor
from patchscopes.runs.folder import Run, compact, open_run, write_piece, write_record, write_table
from patchscopes.runs.here import Here
from patchscopes.runs.processes import Processes
from patchscopes.runs.recording import sweep
from patchscopes.runs.schema import PLAN, ROWS
from patchscopes.scopes.viewing import Viewing

PROMPTS = 124  # of 9 x 9 cells: 10,044 readings
OVERHEAD, OPENING, FORESEEN = 1.05, 0.2, (0.8, 1.2)
LAYERS, COLUMNS, RANKS = 80, 2000, 10  # of the big table: 1.6 million rows
PIECES = 256


def experiment(prompts: int = PROMPTS) -> Experiment:
    """Entities of the bundled model, read at every layer and written at every layer."""
    names = list(dict.fromkeys(fact.entity for fact in world(1.0).facts))[:prompts]
    return Experiment(
        name="bench",
        prompts=[f"Yesterday we talked about {name}" for name in names],  # type: ignore[arg-type]  # pydantic reads texts
        layers="all",
        target_layer="all",
        controls=False,
    )


def recorded_part(repeat: int, progress: Progress) -> tuple[list[Figure], dict[str, Any]]:
    """The figures, and the seconds behind them. Sides take turns."""
    asked = experiment()
    model = load("atlas")
    bare, recorded, foreseen, one, two = [], [], [], [], []
    for k in range(repeat):
        progress(k, repeat, "recorded sweeps")
        started = time.perf_counter()
        (look, *_), _ = looks(asked, {"atlas": model})
        n = len(Viewing(look.scope, look.sources, look.controls).read())
        bare.append(time.perf_counter() - started)
        started = time.perf_counter()
        run, told = _sweep(asked, Here(), models={"atlas": model})
        recorded.append(time.perf_counter() - started)
        assert run["ok"] == n
        foreseen.append(_foreseen(told))
        one.append(_working(_sweep(asked, Processes(workers=1, threads=1))[1]))
        two.append(_working(_sweep(asked, Processes(workers=2, threads=1))[1]))
    progress(repeat, repeat, "recorded sweeps")
    opened = _opening()
    ratio = statistics.median(r / b for r, b in zip(recorded, bare, strict=True))
    faster = statistics.median(a / b for a, b in zip(one, two, strict=True))
    figures = [
        Figure("runs", "recorded sweep / bare engine, 10,044 readings", ratio, at_most=OVERHEAD),
        Figure("runs", "time foreseen after a tenth / time it took", statistics.median(foreseen), note="goal: 0.8 to 1.2"),
        Figure("runs", "one worker / two workers", faster, note="a process each, one thread each"),
        Figure("runs", "1.6 million rows opened and one layer read, seconds", opened, at_most=OPENING),
    ]
    return figures, {"bare": bare, "recorded": recorded, "foreseen": foreseen, "one": one, "two": two, "opening": opened}


def _sweep(asked: Experiment, executor: Executor, **more: Any) -> tuple[dict[str, int], list[tuple[float, dict[str, Any]]]]:
    """The counts, and every event with when it was heard."""
    told: list[tuple[float, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        listeners = [lambda event: told.append((time.perf_counter(), event))]
        return sweep(asked, runs=folder, executor=executor, listeners=listeners, **more).counts, told


def _working(told: list[tuple[float, dict[str, Any]]]) -> float:
    """Seconds from the last worker's being ready to the last shard."""
    ready = max(t for t, event in told if event["kind"] == "worker" and event["state"] == "ready")
    return max(t for t, event in told if event["kind"] == "shard") - ready


def _foreseen(told: list[tuple[float, dict[str, Any]]]) -> float:
    """At the first progress event behind a tenth of the work: seconds left by it / seconds that were left."""
    end = max(t for t, event in told if event["kind"] == "shard")
    at, event = next((t, e) for t, e in told if e["kind"] == "progress" and e["share"] >= 0.1 and e["eta"] is not None)
    return event["eta"][0] / (end - at)


def _opening() -> float:
    with tempfile.TemporaryDirectory() as folder:
        path = big_run(Path(folder))
        compact(Run(path))
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            found = open_run(path).scan().filter(pl.col("source_layer") == LAYERS // 2).collect()
            seconds.append(time.perf_counter() - started)
            assert len(found) == COLUMNS * RANKS
        return statistics.median(seconds)


def big_run(path: Path) -> Path:
    """A run folder of 1.6 million made-up rows."""
    n = LAYERS * COLUMNS * RANKS
    rng, k = np.random.default_rng(0), np.arange(n)
    said = np.array([f"words number {i}" for i in range(5000)])[rng.integers(0, 5000, n)]
    rows = pl.DataFrame(
        {
            "cell": [hashlib.blake2b(str(i).encode(), digest_size=8).hexdigest() for i in range(n)],
            "prompt": k // (LAYERS * RANKS),
            "source_layer": k // RANKS % LAYERS,
            "target_layer": k // RANKS % LAYERS,
            "target": k % RANKS,
            "text": said,
            "next_token_id": rng.integers(0, 50_000, n),
            **{name: rng.random(n) for name in ("logprob", "surprisal", "norm_ratio")},
        }
    )
    same = {
        "part": "big",
        "model": "made up",
        "scope": "describe",
        "position": 3,
        "token": " x",
        "map": "identity",
        "control": "none",
    }
    same |= {"draw": 0, "status": "ok", "n_tokens": 5, "next_token": " words", "attempt": 0, "provenance": 0}
    rows = rows.with_columns(pl.lit(value).alias(name) for name, value in same.items())
    rows = rows.select((pl.col(c) if c in rows.columns else pl.lit(None)).cast(kind).alias(c) for c, kind in ROWS.items())
    size = n // PIECES
    for shard in range(PIECES):
        write_piece(path, shard, 0, rows[shard * size : (shard + 1) * size])
    more = {"shard": 0, "look": 0, "index": 0, "cost": 1.0}
    plan = rows.with_columns(pl.lit(value).alias(name) for name, value in more.items())
    write_table(path / "plan.parquet", plan.select(pl.col(name).cast(kind) for name, kind in PLAN.items()))
    prompts = {"part": "big", "model": "made up", "prompt_text": "made up"}
    numbers = pl.DataFrame({"prompt": range(COLUMNS), "ids": [[0]] * COLUMNS})
    write_table(path / "prompts.parquet", numbers.with_columns(pl.lit(value).alias(name) for name, value in prompts.items()))
    record = {"schema_version": 2, "id": "0000", "name": "big", "created": "", "status": "done", "cells": n}
    write_record(path, {**record, "looks": [], "provenance": [], "caveats": [], "spec": None})
    return path
