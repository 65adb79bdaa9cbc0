"""Token erasure: at the last token of a word, does the state lose which tokens the word was made of?

At each layer ℓ and for i = 0, −1, −2 a linear probe (`token_probe`) tells from the state at position t which token stands at t + i,
trained on one half of the texts and used on the other. What is erased between an early and a late layer is

    drop(t, i) = p_early(t, i) − p_late(t, i)          p: the probability of the token that stands there

and a span of tokens a … b is scored by how much of itself it loses, less what it loses of what came before it:

    ψ(a, b) = mean of  drop(b, 0)  and  s · drop(t, i) for t = a … b, i = −1, −2;      s = −1 where t + i < a, else 1

A text is cut into the spans with the highest ψ that do not overlap: what the model treats as one item. Feucht et al. 2024, "Token Erasure
as a Footprint of Implicit Vocabulary Items in LLMs".

The truth is known to the letter: words that the tokenizer splits, and, where texts are the bundled model's, the names in them. The late
layer is chosen on one half of these and scored on the other, beside all other places, and beside spans of as many tokens that are no word.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patchscopes.core.errors import InputError, PromptError
from patchscopes.evaluate import planted, statistics
from patchscopes.evaluate.frame import Asked, Line, Lines, Result, Table, caveats_of, ours, paper, recorded, settings_of
from patchscopes.evaluate.next_token import left_out
from patchscopes.evaluate.next_token import texts as texts_of
from patchscopes.evaluate.statistics import Estimate
from patchscopes.evaluate.token_probe import probability_of
from patchscopes.evaluate.vectors import vectors_at
from patchscopes.experiment.spec import Experiment

if TYPE_CHECKING:
    from patchscopes.model.tokens import Tokens
    from patchscopes.runs import Run

TITLE = "Token erasure"
PAPER = "Feucht et al. 2024, Token Erasure as a Footprint of Implicit Vocabulary Items in LLMs"
TEXTS, QUICK = 300, 80
OFFSETS = (0, -1, -2)
Span = tuple[int, int]  # first and last token


@dataclass(frozen=True)
class Settings:
    """Every choice.

    early     the layer before; the paper's is 1 of 32
    layers    that the late one is chosen from; the paper's is 9 of 32
    longest   tokens of a span
    """

    early: int = 1
    layers: str = paper("0:-1", "9")
    longest: int = ours(5)


@dataclass(frozen=True)
class Document:
    """A text's token ids, of which the first `start` are the tokenizer's own (BOS), and its units: spans of several tokens that are one
    word or name, with what they say."""

    text: str
    ids: tuple[int, ...]
    start: int
    units: Mapping[Span, str]

    @property
    def taken(self) -> set[int]:
        """Positions in a unit."""
        return {t for a, b in self.units for t in range(a, b + 1)}


def plan(asked: Asked, settings: Settings) -> list[Experiment]:
    """What will be run."""
    return [_experiment(asked, settings, _documents(asked, settings)[0])]


def evaluate(asked: Asked, settings: Settings | None = None) -> Result:
    """The figures of the module's docstring."""
    settings = settings or Settings()
    documents, notes = _documents(asked, settings)
    run = recorded(asked, _experiment(asked, settings, documents))
    p = probabilities(run, documents, asked.seed)
    layers = sorted(p)
    if settings.early not in layers or len(layers) < 3:
        raise InputError(f"layers are {layers}; expected layer {settings.early} (early) and at least two more")
    late = chosen_late(p, documents, settings.early, asked.seed)
    own, deviations = settings_of(settings, asked)
    deviations = (
        *deviations,
        "The probes have a closed form (linear discriminants); the paper's are trained by gradient descent.",
    )
    return _result(p, documents, settings, late, own, deviations, (*notes, *caveats_of([run])), run, asked.seed)


# ----------------------------------------------------------------------------------------------------------------------------- texts


def units_of(tokens: Tokens, names: Sequence[str] = (), longest: int = 5) -> dict[Span, str]:
    """Spans of 2 to `longest` tokens that begin and end where a name or a word does; a word inside a name is none. The first token of a
    text, where a tokenizer puts no space, counts as others do."""
    places: list[tuple[int, int, str]] = []
    for name in names:
        places += [(m.start(), m.end(), name) for m in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", tokens.text)]
    places += [(m.start(), m.end(), m.group()) for m in re.finditer(r"\w+", tokens.text)]
    found: dict[Span, str] = {}
    taken: list[tuple[int, int]] = []
    for start, stop, what in sorted(places, key=lambda place: (place[0] - place[1], place[0])):  # the longest first
        if any(a < stop and start < b for a, b in taken):
            continue
        taken.append((start, stop))
        inside = [k for k, (a, b) in enumerate(tokens.offsets) if a < stop and b > start]
        first, last = tokens.offsets[inside[0]][0], tokens.offsets[inside[-1]][1]
        if 2 <= len(inside) <= longest and not tokens.text[first:start].strip() and last == stop:
            found[inside[0], inside[-1]] = what
    return found


def _documents(asked: Asked, settings: Settings) -> tuple[list[Document], list[str]]:
    n = asked.items(TEXTS, QUICK)
    notes: list[str] = []
    found = texts_of(asked.data, notes) if asked.data is not None else planted.texts(n, asked.seed)
    some = [text for text in dict.fromkeys(found) if text.strip()]
    random.Random(f"{asked.seed} token-erasure").shuffle(some)
    names = [entity.name for entity in planted.entities()] if asked.data is None else []
    if asked.models is not None:
        tokens = next(iter(asked.models.values())).tokens
    else:
        from patchscopes.runs.conditions import outline_spec

        tokens = outline_spec(asked.spec, "cpu").tokens
    documents = []
    unread: list[str] = []
    for text in some:
        if len(documents) == n:
            break
        try:
            seen = tokens(text)
        except PromptError as e:  # more tokens than the model reads: the next text takes its place
            unread.append(str(e))
            continue
        start = next((k for k, added in enumerate(seen.special) if not added), len(seen))
        documents.append(
            Document(text, seen.ids, start, units_of(seen, [name for name in names if name in text], settings.longest))
        )
    notes += left_out(unread, len(unread) + len(documents))
    first = [statistics.in_first_half(one.text, asked.seed) for one in documents]
    units = sum(len(one.units) for one in documents)
    if not documents or all(first) or not any(first) or units < 2:
        raise InputError(
            f"{len(documents)} texts with {units} words of several tokens were found; expected at least two texts and two such words"
        )
    if len(some) < len(found) and asked.data is not None:
        notes.append(f"{len(found) - len(some):,} of {len(found):,} texts were left out: empty, or there twice.")
    return documents, notes


def _experiment(asked: Asked, settings: Settings, documents: Sequence[Document]) -> Experiment:
    """Every state of every text, kept; the logit lens is the cheapest scope."""
    return Experiment.model_validate(
        {
            "name": "token-erasure",
            "model": dict(asked.model) if not isinstance(asked.model, str) else asked.model,
            "prompts": [{"text": one.text} for one in documents],
            "at": "all",
            "layers": settings.layers,
            "scope": ["logit-lens"],
            "controls": False,
            "seed": asked.seed,
            "outputs": {"vectors": True},
        }
    )


# ---------------------------------------------------------------------------------------------------------------------------- scores

Read = dict[int, list[np.ndarray]]  # layer → for each document [position, offset]


def probabilities(run: Run, documents: Sequence[Document], seed: int = 0) -> Read:
    """p of the token at t + i, for each document by the probe of the other half. NaN where there is none, or the half never had it."""
    vectors = vectors_at(run)
    layers = sorted({layer for _, _, layer in vectors})
    first = [statistics.in_first_half(one.text, seed) for one in documents]
    found: Read = {layer: [np.full((len(one.ids), len(OFFSETS)), np.nan) for one in documents] for layer in layers}
    for column, i in enumerate(OFFSETS):
        places = [(d, t) for d, one in enumerate(documents) for t in range(len(one.ids)) if t + i >= 0]
        tokens = [documents[d].ids[t + i] for d, t in places]
        for layer in layers:
            x = torch.stack([vectors[d, t, layer] for d, t in places])
            for half in (True, False):
                away = [k for k, (d, _) in enumerate(places) if first[d] is half]
                fit = [k for k, (d, _) in enumerate(places) if first[d] is not half]
                p = probability_of(x[fit], [tokens[k] for k in fit], x[away], [tokens[k] for k in away])
                for k, value in zip(away, p.tolist(), strict=True):
                    found[layer][places[k][0]][places[k][1], column] = value
    return found


def span_score(drop: np.ndarray, a: int, b: int) -> float:
    """ψ(a, b) of drop[position, offset]; terms that are NaN are left out, NaN if all are."""
    terms = [drop[b, 0]]
    for t in range(a, b + 1):
        terms += [(-1 if t + i < a else 1) * drop[t, column] for column, i in enumerate(OFFSETS) if i]
    kept = [value for value in terms if value == value]
    return float(np.mean(kept)) if kept else float("nan")


def segments(drop: np.ndarray, longest: int, start: int = 0) -> list[tuple[Span, float]]:
    """Spans of 2 to `longest` tokens with ψ > 0, the highest first, none of which overlaps a higher one; in order of their place."""
    scored = [((a, b), span_score(drop, a, b)) for a, b in _spans(start, len(drop), longest)]
    kept: list[tuple[Span, float]] = []
    for (a, b), score in sorted(scored, key=lambda one: (-one[1], one[0]) if one[1] == one[1] else (np.inf, one[0])):
        if score > 0 and all(b < c or d < a for (c, d), _ in kept):
            kept.append(((a, b), score))
    return sorted(kept)


def _spans(start: int, n: int, longest: int) -> Iterator[Span]:
    return ((a, b) for a in range(start, n) for b in range(a + 1, min(n, a + longest)))


def drops(p: Read, early: int, late: int) -> list[np.ndarray]:
    """For each document drop[position, offset]."""
    return [one - other for one, other in zip(p[early], p[late], strict=True)]


def at_ends(
    drop: Sequence[np.ndarray], documents: Sequence[Document], column: int
) -> tuple[list[tuple[float, str]], list[tuple[float, int]]]:
    """(drops at last tokens of units, of tokens inside them, with the unit; drops at positions that are in no unit, with the document)."""
    inside: list[tuple[float, str]] = []
    outside: list[tuple[float, int]] = []
    for d, (one, table) in enumerate(zip(documents, drop, strict=True)):
        taken = one.taken
        values = [(table[b, column], what) for (a, b), what in one.units.items() if b + OFFSETS[column] >= a]
        inside += [(float(value), what) for value, what in values if value == value]
        outside += [(float(v), d) for t, v in enumerate(table[:, column]) if t >= one.start and t not in taken and v == v]
    return inside, outside


def chosen_late(p: Read, documents: Sequence[Document], early: int, seed: int = 0) -> int:
    """The layer above `early` at which units of one half have lost most of the token before their last, beyond what other places lose."""

    def lost(late: int) -> float:
        inside, outside = at_ends(drops(p, early, late), documents, 1)
        own = [value for value, what in inside if statistics.in_first_half(what, seed)]
        return float(np.mean(own) - np.mean([value for value, _ in outside])) if own and outside else float("-inf")

    later = [layer for layer in sorted(p) if layer > early]
    if not later or max(map(lost, later)) == float("-inf"):
        raise InputError(f"no late layer could be chosen above layer {early}; give more texts (--n, --data), or other layers")
    return max(later, key=lost)


def higher_than_chance(
    drop: Sequence[np.ndarray], documents: Sequence[Document], longest: int, seed: int = 0
) -> list[tuple[float, str]]:
    """For each unit that did not choose the layer: does it score higher than a span of as many tokens of its text, drawn by the seed, that
    shares no token with a unit? 1, 0, or ½ for equals; units without such a span are left out."""
    found = []
    for one, table in zip(documents, drop, strict=True):
        taken = one.taken
        for (a, b), what in one.units.items():
            if statistics.in_first_half(what, seed):
                continue
            free = [
                (c, d) for c, d in _spans(one.start, len(one.ids), longest) if d - c == b - a and not taken & set(range(c, d + 1))
            ]
            if free:
                mine, other = span_score(table, a, b), span_score(table, *random.Random(f"{seed} {one.text} {a}").choice(free))
                if mine == mine and other == other:
                    found.append((0.5 if mine == other else float(mine > other), what))
    return found


# --------------------------------------------------------------------------------------------------------------------------- result


def _result(
    p: Read,
    documents: Sequence[Document],
    settings: Settings,
    late: int,
    own: dict[str, Any],
    deviations: Sequence[str],
    caveats: Sequence[str],
    run: Run,
    seed: int,
) -> Result:
    drop = drops(p, settings.early, late)
    lost: dict[str, dict[str, Estimate]] = {}
    for column, i in enumerate(OFFSETS):
        inside, outside = at_ends(drop, documents, column)
        away = [(value, what) for value, what in inside if not statistics.in_first_half(what, seed)]
        lost[str(i)] = {
            "units": statistics.rate([v for v, _ in away], [w for _, w in away], seed=seed),
            "others": statistics.rate([v for v, _ in outside], [d for _, d in outside], seed=seed),
        }
    ranked = higher_than_chance(drop, documents, settings.longest, seed)
    auc = statistics.rate([value for value, _ in ranked], [what for _, what in ranked], seed=seed)
    cut = [
        (span in one.units, d)
        for d, (one, table) in enumerate(zip(documents, drop, strict=True))
        for span, _ in segments(table, settings.longest, one.start)
    ]
    spans = [span in one.units for one in documents for span in _spans(one.start, len(one.ids), settings.longest)]
    precision = statistics.rate([float(hit) for hit, _ in cut], [d for _, d in cut], seed=seed)
    units = sum(len(one.units) for one in documents)
    scores = {
        "early": settings.early,
        "late": late,
        "lost": lost,
        "higher_than_another_span": auc,
        "segments_that_are_units": precision,
        "spans_that_are_units": float(np.mean(spans)),
        "units_found": sum(hit for hit, _ in cut) / units,
        "units": units,
        "texts": len(documents),
    }
    one = lost["-1"]
    claims = (
        f"From layer {settings.early} to {late}, chosen on other words, {one['units']} of the token before is lost at the ends of words of "
        f"several tokens, {one['others']} elsewhere (as probability of a probe; below 0 it is gained).",
        f"A word of several tokens scores higher than another span of as many tokens for {auc}; chance is 50 %.",
        f"Of the spans that the score cuts texts into, {precision} are such words, of all spans {scores['spans_that_are_units']:.1%}.",
    )
    headline: dict[str, Any] = {}
    for i, by_place in lost.items():
        headline |= {
            f"lost of the token at {i}, ends of words": by_place["units"],
            f"lost of the token at {i}, elsewhere": by_place["others"],
        }
    headline |= {"higher ψ than another span": auc, "segments that are words": precision}
    headline |= {"all spans that are words": f"{scores['spans_that_are_units']:.1%}"}
    rows = tuple((int(i), by_place["units"], by_place["others"]) for i, by_place in lost.items())
    table = Table(
        "lost",
        f"What is lost of the token at t + i from layer {settings.early} to {late}, as probability",
        ("i", "ends of words", "elsewhere"),
        rows,
        ("ends of words", "elsewhere"),
    )
    return Result(
        "token-erasure",
        TITLE,
        PAPER,
        claims,
        headline,
        scores,
        (table,),
        (_curves(p, documents, seed),),
        own,
        tuple(deviations),
        tuple(caveats),
        (run,),
    )


def _curves(p: Read, documents: Sequence[Document], seed: int) -> Lines:
    lines = []
    layers = sorted(p)
    for column, i in enumerate(OFFSETS):
        by_layer = [at_ends(p[layer], documents, column) for layer in layers]
        ends = [statistics.rate([v for v, _ in inside], [w for _, w in inside], seed=seed) for inside, _ in by_layer]
        elsewhere = [statistics.rate([v for v, _ in outside], [d for _, d in outside], seed=seed) for _, outside in by_layer]
        for name, some, dashed in ((f"i = {i}, ends of words", ends, False), (f"i = {i}, elsewhere", elsewhere, True)):
            y, low, high = (tuple(getattr(one, key) for one in some) for key in ("value", "low", "high"))
            lines.append(Line(name, tuple(map(float, layers)), y, low, high, dashed))
    title = "Probability that a probe gives the token at t + i, 95 % intervals over words"
    return Lines("by-layer", title, "layer ℓ", "probability", tuple(lines), (0, 1.03))
