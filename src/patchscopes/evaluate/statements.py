"""What a text claims, true and false together: specificity and hallucination, absent concepts.

A rate of hits alone rewards a text that lists everything. Given all answers that a question may have (the vocabulary of a relation, or
of a world), a text *names* some of them: it is correct if a true one is among them, hallucinates if a false one is, is vague if it
names none; it may do the first two at once. "not Paris" names Paris: matching knows no negation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from patchscopes.core.errors import InputError
from patchscopes.evaluate.scoring import names
from patchscopes.evaluate.statistics import Estimate, rate

Vocabulary: TypeAlias = Mapping[str, Sequence[str]]  # answer → the aliases that name it


@dataclass(frozen=True)
class Row:
    """What one text names, of true and of false answers."""

    true: frozenset[str]
    false: frozenset[str]


@dataclass(frozen=True)
class Stated:
    """Shares of texts: correct, hallucinated, both of these, vague (it names nothing). precision: of the texts that name
    anything, those that name nothing false."""

    correct: Estimate
    hallucinated: Estimate
    both: Estimate
    vague: Estimate
    precision: Estimate
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Concepts:
    """absent: the mean over texts of the share of absent concepts that a text names all the same. by_concept: for each, of the texts in
    which it is absent. minor: the share of texts that name their minor concept; None where none was given."""

    absent: Estimate
    by_concept: dict[str, Estimate]
    minor: Estimate | None


def named(texts: Sequence[str], vocabulary: Vocabulary, sources: Sequence[str] | None = None) -> list[tuple[frozenset[str], ...]]:
    """For every text its mentions, each the answers that share the alias. The longest alias counts, as whole words, in any case ("New
    York" does not name York); of one character as in `scoring.names`. sources: aliases that a row's source says do not count."""
    owners: dict[str, set[str]] = {}
    for answer, aliases in vocabulary.items():
        for alias in (aliases,) if isinstance(aliases, str) else aliases:
            if key := _key(alias):
                owners.setdefault(key, set()).add(answer)
    if not owners:
        raise InputError("the vocabulary has no alias; give every answer one or more")
    if sources is not None and len(sources) != len(texts):
        raise InputError(f"{len(sources)} sources for {len(texts)} texts; give one a row")
    pattern = "|".join(_pattern(key) for key in sorted(owners, key=len, reverse=True))
    finder = re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE)
    found = []
    for k, text in enumerate(texts):
        mentions = {_key(one[0]) for one in finder.finditer(unicodedata.normalize("NFKC", text))}
        if sources is not None:
            mentions = {key for key in mentions if not names(sources[k], key)}
        found.append(tuple(frozenset(owners[key]) for key in sorted(mentions)))
    return found


def stated(
    texts: Sequence[str],
    true: Sequence[Collection[str]],
    vocabulary: Vocabulary,
    clusters: Sequence[Hashable],
    *,
    sources: Sequence[str] | None = None,
    seed: int = 0,
) -> Stated:
    """true: for every text its true answers, of the vocabulary. An alias of a true and a false answer counts as the true one."""
    _known(true, vocabulary)
    if len(true) != len(texts):
        raise InputError(f"true answers of {len(true)} rows for {len(texts)} texts; give one set a row")
    rows = []
    for mentions, right in zip(named(texts, vocabulary, sources), true, strict=True):
        hits = [mention & set(right) for mention in mentions]
        wrong = [mention for mention, hit in zip(mentions, hits, strict=True) if not hit]
        rows.append(Row(frozenset().union(*hits), frozenset().union(*wrong)))

    def share(values: Sequence[bool]) -> Estimate:
        return rate([float(value) for value in values], clusters, seed=seed)

    specific = [(row, c) for row, c in zip(rows, clusters, strict=True) if row.true or row.false]
    return Stated(
        share([bool(row.true) for row in rows]),
        share([bool(row.false) for row in rows]),
        share([bool(row.true and row.false) for row in rows]),
        share([not (row.true or row.false) for row in rows]),
        rate([float(not row.false) for row, _ in specific], [c for _, c in specific], seed=seed),
        tuple(rows),
    )


def concepts(
    texts: Sequence[str],
    present: Sequence[Collection[str]],
    vocabulary: Vocabulary,
    clusters: Sequence[Hashable],
    *,
    minor: Sequence[str | None] | None = None,
    seed: int = 0,
) -> Concepts:
    """present: the concepts of every text's state; all others of the vocabulary are absent from it. minor: of a mixture a + λ b the
    weaker concept, None where there is none. Recall of minor ones is worth nothing without the rate at which absent ones are named."""
    if len(present) != len(texts) or (minor is not None and len(minor) != len(texts)):
        raise InputError(f"{len(texts)} texts, concepts of {len(present)} rows; give them (and the minor ones) row by row")
    _known(present, vocabulary)
    _known([[one] for one in minor or () if one is not None], vocabulary)
    said = [frozenset().union(*mentions) for mentions in named(texts, vocabulary)]
    there = np.array([[c in some for c in vocabulary] for some in present], bool).reshape(len(texts), len(vocabulary))
    named_at = np.array([[c in some for c in vocabulary] for some in said], bool).reshape(there.shape)
    partly = np.flatnonzero(~there.all(axis=1)).tolist()
    absent = (named_at & ~there)[partly].sum(axis=1) / (~there)[partly].sum(axis=1)
    by_concept = {}
    for k, concept in enumerate(vocabulary):
        away = np.flatnonzero(~there[:, k]).tolist()
        by_concept[concept] = rate(named_at[away, k].astype(float), [clusters[i] for i in away], seed=seed)
    recall = None
    if minor is not None:
        some = [(one in said[i], clusters[i]) for i, one in enumerate(minor) if one is not None]
        recall = rate([float(hit) for hit, _ in some], [c for _, c in some], seed=seed)
    return Concepts(rate(absent, [clusters[i] for i in partly], seed=seed), by_concept, recall)


def _key(alias: str) -> str:
    alias = " ".join(unicodedata.normalize("NFKC", alias).split())
    return alias.lower() if len(alias) > 1 else alias


def _pattern(key: str) -> str:
    words = r"\s+".join(re.escape(word) for word in key.split())
    return words if len(key) > 1 else f"(?-i:{words})"


def _known(some: Sequence[Collection[str]], vocabulary: Vocabulary) -> None:
    odd = sorted({one for row in some for one in row} - set(vocabulary))
    if odd:
        raise InputError(f"{', '.join(map(repr, odd[:3]))} not in the vocabulary of {len(vocabulary)}; give its aliases there")
