"""Run folders made without a model: every cell is what the test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from patchscopes.runs.folder import SCHEMA_VERSION, Run, write_piece, write_record, write_table
from patchscopes.runs.schema import PLAN, ROWS

KINDS = ("nothing", "random", "other", "mean", "text")
VERSIONS = {"patchscopes": "0.1.0", "torch": "2.13.0"}

Cell = Callable[[dict[str, Any]], dict[str, Any] | None]  # what is known of a cell, from where it stands; None: waiting


def said(where: dict[str, Any]) -> dict[str, Any]:
    """An ordinary reading: early layers are above their controls, late ones are not."""
    k = where["prompt"] * 7 + where["position"] * 3 + where["source_layer"] + where["target_layer"]
    own = where["control"] == "none"
    found = {
        "text": f" word {k}" if own else f" {where['control']} {k % 3}",
        "n_tokens": 2,
        "next_token": " word",
        "next_token_id": k % 100,
        "logprob": -0.123456 * (k % 9 + 1),
        "surprisal": 1.234567 * (k % 11),
        "norm_ratio": 1.0 + k / 1000,
    }
    if own:
        above = where["source_layer"] < 3
        bits = {f"bits_over_{kind}": (4.2 if above else -1.1) + (k % 5) / 7 for kind in ("nothing", "random", "others", "text")}
        found |= {**bits, "p_value": 0.04 if above else 0.52, "verdict": "above" if above else "same"}
    return found


def make_run(
    folder: Path,
    *,
    prompts: Sequence[str] = ("We talked about France", "The letter came from Japan", "She lives in Peru"),
    layers: int = 5,
    positions: Sequence[int] = (3,),
    targets: Sequence[int] | None = None,
    scopes: Sequence[str] = ("describe",),
    controls: bool = True,
    cell: Cell = said,
    status: str = "done",
    model: str = "atlas",
    **record: Any,
) -> Run:
    """A run. targets: target layers; None: as the source layer."""
    kinds = ("none", *KINDS) if controls else ("none",)
    wheres = [
        {
            "part": "the part",
            "model": model,
            "scope": scope,
            "prompt": p,
            "position": i,
            "token": f" token{i}",
            "source_layer": layer,
            "target": 0,
            "target_layer": target,
            "map": "identity",
            "control": kind,
            "draw": 0,
            "shard": 0,
            "look": look,
            "index": 0,
            "cost": 1.0,
        }
        for look, scope in enumerate(scopes)
        for p in range(len(prompts))
        for i in positions
        for layer in range(layers)
        for target in (targets if targets is not None else (layer,))
        for kind in kinds
    ]
    index = -1
    for k, where in enumerate(wheres):
        index = 0 if k == 0 or where["look"] != wheres[k - 1]["look"] else index + (where["control"] == "none")
        where |= {"index": index, "cell": f"{k:016x}"}
    rows = []
    for where in wheres:
        known = cell(where)
        if known is not None:
            rows.append({"status": "ok", **where, "attempt": 0, "provenance": 0, **known})
    (folder / "shards").mkdir(parents=True)
    write_table(folder / "plan.parquet", pl.DataFrame(wheres, schema=PLAN))
    if rows:
        write_piece(folder, 0, 0, pl.DataFrame([{name: row.get(name) for name in ROWS} for row in rows], schema=ROWS))
    ids = [[1, 2, 3 + k] for k in range(len(prompts))]
    names = {"part": ["the part"] * len(prompts), "model": [model] * len(prompts), "prompt": list(range(len(prompts)))}
    write_table(folder / "prompts.parquet", pl.DataFrame({**names, "prompt_text": list(prompts), "ids": ids}))
    scope_about = {"targets": [{"text": "who is x", "ids": [1, 2], "position": 1}], "seed": 0, "draws": 1, "max_new_tokens": 8}
    look = {"part": "the part", "model": model, "target_model": model, "controls": controls}
    about = {
        "source_layers": list(range(layers)),
        "controls": {"pool": "a pool", "others_per_reading": [24]} if controls else None,
    }
    whole = {
        "schema_version": SCHEMA_VERSION,
        "id": "7f3c",
        "name": "made up",
        "created": "2026-11-20T12:00:00+00:00",
        "status": status,
        "cells": len(wheres),
        "shards": 1,
        "digest": "sha256:0123",
        "spec": {"name": "made up", "model": [{"name": model}], "prompts": [{"text": text} for text in prompts]},
        "looks": [{**look, "scope": scope, "provenance": {"scope": {"name": scope, **scope_about}, **about}} for scope in scopes],
        "provenance": [{"conditions": {"models": {model: {"files": "de23b6", "dtype": "float32"}}, "versions": VERSIONS}}],
        "caveats": [],
    }
    write_record(folder, {**whole, **record})
    return Run(folder)
