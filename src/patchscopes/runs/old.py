"""Schema 1: the folder that `Readings.save` writes, one call of a scope in one table. It is seen as a finished run of one part."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import polars as pl

from patchscopes.runs.schema import ROWS

PART = "readings"


def from_readings(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run, made of the provenance of readings."""
    table = pl.scan_parquet(path / "readings.parquet", glob=False)
    source = record["source_model"]
    model = {"files": source["weight_hash"], "dtype": source["dtype"], "attention": source.get("attention")}
    conditions = {"models": {source["model"]: model}, "versions": source["versions"], "device": source["device"]}
    settings = {name: record[name] for name in ("source_layers", "scope", "controls")}
    scope = record["scope"]["name"]
    look = {"part": PART, "model": source["model"], "scope": scope, "controls": record["controls"] is not None}
    return {
        "schema_version": 1,
        "id": hashlib.blake2b(path.name.encode(), digest_size=2).hexdigest(),
        "name": path.name,
        "created": record["time"],
        "status": "done",
        "cells": table.select(pl.len()).collect().item(),
        "shards": 1,
        "spec": None,
        "looks": [{**look, "provenance": settings}],
        "provenance": [{"conditions": conditions, "models": {source["model"]: source}}],
        "caveats": ["saved by an older version: it can be read, but neither resumed nor reproduced"],
    }


def rows_of_readings(path: Path, record: dict[str, Any]) -> pl.LazyFrame:
    """Its rows with the columns of a run; cells are numbered, since nobody hashed them."""
    (look,) = record["looks"]
    rows = (
        pl.scan_parquet(path / "readings.parquet", glob=False)
        .with_row_index("cell")
        .with_columns(
            pl.col("cell").cast(pl.String),
            part=pl.lit(PART),
            model=pl.lit(look["model"]),
            scope=pl.lit(look["scope"]),
            status=pl.lit("ok"),
            attempt=pl.lit(0),
            provenance=pl.lit(0),
        )
    )
    there = rows.collect_schema().names()
    return rows.select((pl.col(name) if name in there else pl.lit(None)).cast(kind).alias(name) for name, kind in ROWS.items())


def prompts_of_readings(path: Path, record: dict[str, Any]) -> pl.DataFrame:
    """Its prompts; token ids were recorded by text."""
    ids = {source["text"]: source["ids"] for source in record.get("sources", ())}
    (look,) = record["looks"]
    table = pl.read_parquet(path / "readings.parquet", columns=["prompt", "prompt_text"]).unique(maintain_order=True)
    return table.select(
        pl.lit(PART).alias("part"),
        pl.lit(look["model"]).alias("model"),
        "prompt",
        "prompt_text",
        pl.Series("ids", [ids.get(text) for text in table["prompt_text"]], dtype=pl.List(pl.Int64)),
    )
