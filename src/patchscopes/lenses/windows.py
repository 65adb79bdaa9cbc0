"""Texts as windows of token ids, and what a model makes of them: states at every layer, and what it says next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchscopes.controls.vectors import POOL
from patchscopes.core.errors import InputError, RefusedError
from patchscopes.model.model import Model
from patchscopes.model.tokens import as_tokens

Window = tuple[int, ...]  # token ids
TOKENS_AT_ONCE = 2048  # of one pass, padding included: the logits of all of them are held
SCORES_AT_ONCE = 2**24  # entries of logits [row, vocab] of one layer
PROBES, SAID = 24, 40  # windows that a model says itself, and the tokens of each


@dataclass(frozen=True, eq=False)
class Seen:
    """What stands at the real tokens of some windows. h[ℓ]: [token, d_model]; log_p: the model's own, nats; following: the ids that come
    next, -1 at the end of a window."""

    h: dict[int, Float[Tensor, "token d_model"]]
    log_p: Float[Tensor, "token vocab"]
    following: Int[Tensor, " token"]


def windows(model: Model, texts: Sequence[str], length: int | None = None) -> list[Window]:
    """Each text as windows of at most `length` tokens (None: the model's context, 2048 at most), each behind what the tokenizer puts in
    front (BOS). Windows of one token are left out. InputError if there are none."""
    most = min(n for n in (length, model.context, 2048) if n is not None)
    if most < 2:
        raise InputError(f"windows of {most} tokens were asked for; expected at least 2")
    known = set(model.tokenizer.all_special_ids)
    found: list[Window] = []
    for text in texts:
        ids = list(model.tokenizer(text)["input_ids"]) if text.strip() else []
        lead = 0
        while lead < len(ids) and ids[lead] in known:
            lead += 1
        step = max(1, most - lead)
        parts = [tuple(ids[:lead] + ids[k : k + step]) for k in range(lead, len(ids), step)]
        found += [part for part in parts if len(part) > 1]
    if not found:
        raise InputError(f"{len(texts)} texts were given, none of at least two tokens; expected some text")
    return found


def own_windows(model: Model, seed: int = 0) -> list[Window]:
    """Text that the model says itself behind short prompts, sampled: what it takes for text, whatever that is. For checks."""
    prompts = [model.tokens(text) for text in POOL[:PROBES]]
    room = SAID if model.context is None else max(1, min(SAID, model.context - max(map(len, prompts))))
    said = model.generate(prompts, max_new_tokens=room, temperature=1.0, seed=seed)
    return [(*prompt.ids, *one.ids) for prompt, one in zip(prompts, said, strict=True)]


def digest_of(some: Sequence[Window]) -> str:
    """A hash of windows in their order."""
    return hashlib.blake2b(json.dumps([list(one) for one in some]).encode(), digest_size=16).hexdigest()


def require_one_stream(model: Model) -> None:
    """RefusedError for models whose residual stream is several, and those that cannot decode a residual."""
    if model.engine.streams:
        raise RefusedError(f"{model.name} carries {model.engine.streams} residual streams; a lens reads a single one")
    model.capabilities.require("unembed", "a lens")


def batches(some: Sequence[Window], tokens: int = TOKENS_AT_ONCE) -> list[list[Window]]:
    """Windows of like length together, so many that a pass has at most `tokens`."""
    queue, found = sorted(some, key=len), []
    while queue:
        size = max(1, tokens // len(queue[-1]))
        found.append(queue[-size:])
        queue = queue[:-size]
    return found


def see(model: Model, batch: Sequence[Window], layers: Sequence[int]) -> Seen:
    """One pass over a batch."""
    run = model.run([as_tokens(ids) for ids in batch], read=[f"resid.{layer}" for layer in layers])
    real = run.mask.to(run.logits.device)
    following = torch.tensor([i for ids in batch for i in (*ids[1:], -1)], device=run.logits.device)
    return Seen({layer: run[f"resid.{layer}"][real] for layer in layers}, run.logits[real].float().log_softmax(-1), following)


def rows_at_once(model: Model, n: int) -> Iterator[slice]:
    """Slices of n rows whose logits can be held together."""
    size = max(1, SCORES_AT_ONCE // model.vocab)
    return (slice(k, min(k + size, n)) for k in range(0, n, size))


def read_texts(path: str | Path, column: str = "text") -> list[str]:
    """Texts in a file: a line each (.txt), or a column of JSONL, CSV, TSV or Parquet."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; expected texts: a line each (.txt), or .jsonl, .csv, .tsv, .parquet")
    readers: dict[str, Any] = {
        ".jsonl": pl.read_ndjson,
        ".ndjson": pl.read_ndjson,
        ".csv": pl.read_csv,
        ".tsv": lambda p: pl.read_csv(p, separator="\t"),
        ".parquet": pl.read_parquet,
    }
    try:
        if path.suffix not in readers:
            return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        table = readers[path.suffix](path)
    except (UnicodeDecodeError, pl.exceptions.PolarsError) as e:
        raise InputError(f"{str(path)!r} could not be read as texts: {str(e).splitlines()[0]}") from None
    if column not in table.columns:
        raise InputError(f"{str(path)!r} has no column {column!r}; it has {', '.join(table.columns)}")
    return [str(text) for text in table[column].drop_nulls().to_list() if str(text).strip()]
