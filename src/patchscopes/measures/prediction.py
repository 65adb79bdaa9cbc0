"""Prediction: does the reading foretell what the model does elsewhere, better than the text does?

The model is asked in words that the scope does not use ("As for France, the capital is"), and its own greedy answer is what is to be
foretold, whether or not it is true. Held against it are what the scope says of

    reading    the state
    asked      no scope: the source's own prompt with the question behind it. What the text alone foretells; with one model for both this is
               strong (Li et al. 2025, arXiv 2509.13316)
    text       the scope with the source's own words in the placeholder's place, nothing patched
    nothing, random, mean   no patch, a random vector, the mean of other sources
    shuffled   the state of another source: the reading of the next place that is of another entity
    majority   no run: the commonest answer of the *other* entities

    says       whether it says the model's answer
    first      whether its first token is the first that the model says: next-token behaviour
    log_p      log p (nats) of its text as the model's own answer: what is not said in the same words counts in part

Criterion F4 of faithful verbalizers. `paired` gives two lists of hits with their clusters, for an exact paired test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from patchscopes.core.errors import InputError
from patchscopes.core.words import names
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Tokens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source
from patchscopes.scopes.written import follow, log_p, one_each, plainly, texts

KINDS = ("reading", "asked", "text", "nothing", "random", "mean", "shuffled", "majority")
_OF_ROWS = {"none": "reading", "text": "text", "nothing": "nothing", "random": "random", "mean": "mean"}


@dataclass(frozen=True)
class Paired:
    """Two lists of hits of the same places, and the cluster of each: what a paired test takes."""

    first: np.ndarray
    second: np.ndarray
    clusters: tuple[Hashable, ...]


@dataclass(frozen=True, eq=False)
class Prediction:
    """table: a row a place and kind: `place`, `kind`, `text`, `answer` (the model's own), `says`, `first`, `log_p` (null without words).
    entities: of each place."""

    table: pl.DataFrame
    entities: tuple[Hashable, ...]

    @property
    def rates(self) -> pl.DataFrame:
        """A row a kind: `kind`, `places`, shares of `says` and `first`, mean `log_p`."""
        means = (pl.col("says").mean(), pl.col("first").mean(), pl.col("log_p").mean())
        return self.table.group_by("kind", maintain_order=True).agg(pl.len().alias("places"), *means)

    def paired(self, first: str = "reading", second: str = "asked", *, column: str = "says") -> Paired:
        """Hits (`says` or `first`) of two kinds at the places that have both."""
        if unknown := sorted({first, second} - set(self.table["kind"])):
            raise InputError(f"there is no {', '.join(unknown)}; expected one of {', '.join(dict.fromkeys(self.table['kind']))}")
        of = [dict(self.table.filter(pl.col("kind") == kind).select("place", column).iter_rows()) for kind in (first, second)]
        both = [k for k in of[0] if k in of[1]]
        hits = [np.array([one[k] for k in both], bool) for one in of]
        return Paired(hits[0], hits[1], tuple(self.entities[k] for k in both))


def prediction(
    source: Source | Sequence[Source],
    scope: Patchscope,
    asked: Sequence[Prompt],
    *,
    question: str | None = None,
    entities: Sequence[Hashable] | None = None,
    says: Callable[[str, str], bool] = names,
) -> Prediction:
    """How well `scope` foretells what the source model says next after `asked`, one prompt for each place of the sources.

    question: what goes on behind the sources' prompts (". The capital is") for the kind `asked`; None: without it. entities: of which each
    place is; None: each of its own. The model's answer is as long, and ends where, as what the scope says.
    """
    one = one_each(scope, source)
    n = len(one.places)
    who = tuple(range(n)) if entities is None else tuple(entities)
    if len(asked) != n or len(who) != n:
        raise InputError(f"{len(asked)} prompts and {len(who)} entities were given for {n} places; expected one each")
    model = one.viewing.origin
    runs = [plainly(model, prompt) for prompt in asked]
    answers = texts(runs, scope)
    table = scope(source, evidence=False).table  # rows of a place stand together, in the order of places
    found: list[tuple[int, str, str]] = []
    place = -1
    for control, text in table.select("control", "text").iter_rows():
        place += control == "none"
        if control in _OF_ROWS:
            found.append((place, _OF_ROWS[control], text))
    readings = {k: text for k, kind, text in found if kind == "reading"}
    if question is not None:
        told = texts([one.source(k, question, None) for k in range(n)], scope)
        found += [(k, "asked", text) for k, text in enumerate(told)]
    for k in range(n):
        if (stranger := next((j % n for j in range(k + 1, k + n) if who[j % n] != who[k]), None)) is not None:
            found.append((k, "shuffled", readings[stranger]))
        others = Counter(answer for j, answer in enumerate(answers) if who[j] != who[k])
        if others:
            found.append((k, "majority", others.most_common(1)[0][0]))
    found.sort(key=lambda row: (KINDS.index(row[1]), row[0]))
    worded = [i for i, (_, _, text) in enumerate(found) if text.strip()]
    likely = dict(zip(worded, log_p([runs[found[i][0]] for i in worded], [found[i][2] for i in worded], scope), strict=True))
    starts = [_first(model, runs[k].prompt, answers[k]) for k in range(n)]
    rows = [
        {
            "place": k,
            "kind": kind,
            "text": text,
            "answer": answers[k],
            "says": bool(answers[k].strip()) and says(text, answers[k]),
            "first": starts[k] is not None and _first(model, runs[k].prompt, text) == starts[k],
            "log_p": likely.get(i),
        }
        for i, (k, kind, text) in enumerate(found)
    ]
    return Prediction(pl.DataFrame(rows, schema_overrides={"log_p": pl.Float64}), who)


def _first(model: Model, prompt: Tokens, text: str) -> int | None:
    """The first token of a text behind a prompt; None where there are no words."""
    return follow(model, prompt, text)[0] if text.strip() else None
