"""Many tries at a question, one for each pair (ℓ, ℓ*): figures beside as many tries with other vectors. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from patchscopes.evaluate import statistics
from patchscopes.evaluate.frame import Heat
from patchscopes.evaluate.hops import Question, lacking, right

if TYPE_CHECKING:
    import polars as pl

KINDS = {"none": "own state", "other": "another question's state", "random": "random vector", "mean": "mean of other prompts"}
# the mean that a viewing has for a control: over its other prompts, and a built-in pool's where these are few


@dataclass(frozen=True)
class Hits:
    """hits[kind]: [question, pair]; pairs: (ℓ, ℓ*). compared: [question], whether another question's state was there ("other"); None:
    everywhere."""

    pairs: tuple[tuple[int, int], ...]
    hits: dict[str, np.ndarray]
    compared: np.ndarray | None = None

    def rows(self, kind: str) -> np.ndarray:
        """[question]: of which questions there are tries of this kind."""
        everyone = np.ones(len(self.hits["none"]), bool)
        return everyone if kind != "other" or self.compared is None else self.compared


def hits_of(table: pl.DataFrame, questions: Sequence[Question], part: str, test: str) -> Hits:
    """Which tries said the answer, of the part of a run's table whose prompts are the questions. What failed is a miss."""
    return hits_at(table, [(part, one.text, one) for one in questions], test)


def hits_at(table: pl.DataFrame, wanted: Sequence[tuple[str, str, Question]], test: str) -> Hits:
    """The same with a part and a prompt for each question. The "other" of a viewing's controls, which may be a prompt of the built-in pool,
    is left out: see `beside`."""
    texts = _said(table, {(part, prompt) for part, prompt, _ in wanted})
    texts.pop("other", None)
    pairs = tuple(sorted({(a, b) for said in texts.values() for *_, a, b in said}))
    hits = {
        kind: np.array(
            [[right(said.get((part, prompt, a, b)), q.e3, test) for a, b in pairs] for part, prompt, q in wanted], bool
        )
        for kind, said in texts.items()
    }
    return Hits(pairs, {kind: values.reshape(len(wanted), len(pairs)) for kind, values in hits.items()})


def beside(
    found: Hits, table: pl.DataFrame, tried: Sequence[tuple[str, str] | None], questions: Sequence[Question], test: str
) -> Hits:
    """`found` with another question's state ("other"), at the same pairs and held against each question's own answer. tried: for every
    question the part and the prompt at which this table has the stranger's readings; None: it has no stranger."""
    said = _said(table, {one for one in tried if one is not None}).get("none", {})
    read = {(part, prompt) for part, prompt, *_ in said}
    compared = np.array([one is not None and one in read for one in tried], bool)
    hits = np.zeros((len(questions), len(found.pairs)), bool)
    for k, (one, question) in enumerate(zip(tried, questions, strict=True)):
        if one is not None and compared[k]:
            hits[k] = [right(said.get((*one, a, b)), question.e3, test) for a, b in found.pairs]
    return Hits(found.pairs, {**found.hits, **({"other": hits} if compared.any() else {})}, compared)


def _said(table: pl.DataFrame, there: Set[tuple[str, str]]) -> dict[str, dict[tuple[str, str, int, int], str]]:
    rows = table.select("part", "prompt_text", "control", "source_layer", "target_layer", "text").iter_rows()
    texts: dict[str, dict[tuple[str, str, int, int], str]] = {}
    for part, prompt, kind, layer, other, text in rows:
        if (part, prompt) in there:
            texts.setdefault(kind, {})[part, prompt, layer, other] = text
    return texts


def read(table: pl.DataFrame, wanted: Iterable[Iterable[tuple[str, str]]]) -> list[bool]:
    """For every question whether the table has readings of all its (part, prompt)."""
    there = set(table.select("part", "prompt_text").unique().iter_rows())
    return [all(one in there for one in some) for some in wanted]


def alone(found: Mapping[str, Hits]) -> list[str]:
    """What must be told of questions with which no other question's state could be compared; found: by place or form."""
    told: dict[str, list[str]] = {}
    for name, hits in found.items():
        if hits.compared is not None and (note := lacking(int((~hits.compared).sum()), len(hits.compared))):
            told.setdefault(note, []).append(name)
    return [f"{', '.join(names)}: {note}" for note, names in told.items()]


def figures(
    found: Hits, some: np.ndarray, clusters: Sequence[str], seed: int = 0, kinds: Iterable[str] = KINDS
) -> dict[str, Any]:
    """Of the N pairs marked in `some`, for each of these kinds of vector: the rate of a try, of the best of N, and of one pair that was
    chosen for the own states on half of the clusters, on the other half. p: McNemar's, of the best of N own tries against N of another
    question's, over_other their difference; both of the questions that have both."""
    none = found.hits["none"][:, some]
    scores: dict[str, Any] = {"n_tries": int(some.sum())}
    kinds = [kind for kind in kinds if kind in found.hits]

    def rate(values: np.ndarray, rows: np.ndarray) -> statistics.Estimate:
        return statistics.rate(values[rows].astype(float), list(compress(clusters, rows)), seed=seed)

    for kind in kinds:
        hits, rows = found.hits[kind][:, some], found.rows(kind)
        scores[f"any_of_N {kind}"] = rate(statistics.any_of(hits), rows)
        scores[f"per_try {kind}"] = rate(statistics.per_draw(hits), rows)
    if "other" in kinds:
        rows = found.rows("other")
        own, other = statistics.any_of(none)[rows], statistics.any_of(found.hits["other"][rows][:, some])
        scores["compared"] = int(rows.sum())
        scores["over_other"] = statistics.difference(own, other, list(compress(clusters, rows)), seed=seed)
        scores["p"] = statistics.mcnemar(int((own & ~other).sum()), int((other & ~own).sum()))
    chosen = statistics.held_out(none, clusters, seed=seed)
    if chosen is not None:
        column = int(np.flatnonzero(some)[chosen.cell])
        scores["pair"] = found.pairs[column]
        away = np.isin(np.arange(len(none)), chosen.scores)
        for kind in kinds:
            if (rows := away & found.rows(kind)).any():
                scores[f"held_out {kind}"] = rate(found.hits[kind][:, column], rows)
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
