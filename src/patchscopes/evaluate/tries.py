"""Many tries at a question, one for each pair (ℓ, ℓ*): figures beside as many tries with other vectors. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscopes.evaluate import statistics
from patchscopes.evaluate.frame import Heat
from patchscopes.evaluate.hops import Question, right

if TYPE_CHECKING:
    import polars as pl

KINDS = {"none": "own state", "other": "another question's state", "random": "random vector", "mean": "mean of others"}


@dataclass(frozen=True)
class Hits:
    """hits[kind]: [question, pair]; pairs: (ℓ, ℓ*)."""

    pairs: tuple[tuple[int, int], ...]
    hits: dict[str, np.ndarray]


def hits_of(table: pl.DataFrame, questions: Sequence[Question], part: str, test: str) -> Hits:
    """Which tries said the answer, of the part of a run's table whose prompts are the questions. What failed is a miss."""
    return hits_at(table, [(part, one.text, one) for one in questions], test)


def hits_at(table: pl.DataFrame, wanted: Sequence[tuple[str, str, Question]], test: str) -> Hits:
    """The same with a part and a prompt for each question."""
    there = {(part, prompt) for part, prompt, _ in wanted}
    rows = table.select("part", "prompt_text", "control", "source_layer", "target_layer", "text").iter_rows()
    texts: dict[str, dict[tuple[str, str, int, int], str]] = {}
    for part, prompt, kind, layer, other, text in rows:
        if (part, prompt) in there:
            texts.setdefault(kind, {})[part, prompt, layer, other] = text
    pairs = tuple(sorted({(a, b) for said in texts.values() for *_, a, b in said}))
    hits = {
        kind: np.array(
            [[right(said.get((part, prompt, a, b)), q.e3, test) for a, b in pairs] for part, prompt, q in wanted], bool
        )
        for kind, said in texts.items()
    }
    return Hits(pairs, {kind: values.reshape(len(wanted), len(pairs)) for kind, values in hits.items()})


def figures(
    found: Hits, some: np.ndarray, clusters: Sequence[str], seed: int = 0, kinds: Iterable[str] = KINDS
) -> dict[str, Any]:
    """Of the N pairs marked in `some`, for each of these kinds of vector: the rate of a try, of the best of N, and of one pair that was
    chosen for the own states on half of the clusters, on the other half. p: McNemar's, of the best of N own tries against N of another
    question's."""
    none = found.hits["none"][:, some]
    scores: dict[str, Any] = {"n_tries": int(some.sum())}
    kinds = [kind for kind in kinds if kind in found.hits]
    for kind in kinds:
        hits = found.hits[kind][:, some]
        scores[f"any_of_N {kind}"] = statistics.rate(statistics.any_of(hits).astype(float), clusters, seed=seed)
        scores[f"per_try {kind}"] = statistics.rate(statistics.per_draw(hits), clusters, seed=seed)
    if "other" in kinds:
        own, other = statistics.any_of(none), statistics.any_of(found.hits["other"][:, some])
        scores["p"] = statistics.mcnemar(int((own & ~other).sum()), int((other & ~own).sum()))
    chosen = statistics.held_out(none, clusters, seed=seed)
    if chosen is not None:
        column = int(np.flatnonzero(some)[chosen.cell])
        scores["pair"] = found.pairs[column]
        away = [clusters[k] for k in chosen.scores]
        for kind in kinds:
            scores[f"held_out {kind}"] = statistics.rate(found.hits[kind][chosen.scores, column].astype(float), away, seed=seed)
    return scores


def share(one: Any) -> float | None:
    """The value of an estimate, for a table."""
    return None if one is None else one.value


def heat(name: str, hits: Hits, pair: tuple[int, int] | None) -> Heat:
    """Share of questions that each pair answers."""
    layers, others = sorted({a for a, _ in hits.pairs}), sorted({b for _, b in hits.pairs})
    rates = dict(zip(hits.pairs, hits.hits["none"].mean(axis=0), strict=True))
    return Heat(
        f"pairs-{name}",
        f"{name}: share of failed questions corrected by each pair; framed: the one chosen on half of the bridge entities",
        "source layer ℓ",
        "target layer ℓ*",
        tuple(map(str, layers)),
        tuple(map(str, others)),
        tuple(tuple(float(rates.get((a, b), np.nan)) for b in others) for a in layers),
        "share",
        None if pair is None else (layers.index(pair[0]), others.index(pair[1])),
    )
