"""The columns of a run: of its plan, of its rows."""

from __future__ import annotations

from typing import Any

import polars as pl

COORDINATES: dict[str, Any] = {
    "cell": pl.String,
    "part": pl.String,
    "model": pl.String,
    "scope": pl.String,
    "prompt": pl.Int64,
    "position": pl.Int64,
    "token": pl.String,
    "source_layer": pl.Int64,
    "target": pl.Int64,
    "target_layer": pl.Int64,
    "map": pl.String,
    "control": pl.String,
    "draw": pl.Int64,
}
PLAN: dict[str, Any] = {**COORDINATES, "shard": pl.Int32, "look": pl.Int32, "index": pl.Int64, "cost": pl.Float64}
RESULTS: dict[str, Any] = {
    "status": pl.String,
    "error": pl.String,
    "text": pl.String,
    "n_tokens": pl.Int64,
    "next_token": pl.String,
    "next_token_id": pl.Int64,
    "logprob": pl.Float64,
    "surprisal": pl.Float64,
    "norm_ratio": pl.Float64,
    "bits_over_nothing": pl.Float64,
    "bits_over_random": pl.Float64,
    "bits_over_others": pl.Float64,
    "bits_over_text": pl.Float64,
    "explained": pl.Float64,
    "p_value": pl.Float64,
    "verdict": pl.String,
    "top_ids": pl.List(pl.Int64),
    "top_logprobs": pl.List(pl.Float64),
    "attempt": pl.Int32,
    "provenance": pl.Int32,
}
ROWS = {**COORDINATES, **RESULTS}
