"""Causal swap: where the state is edited along what was described, do behaviour and description change together?

For a source about a, of which y_a is true, and another about b with y_b, the state of a is edited where it was read:

    state              h_b                         the whole state of b
    random state       h_a + r, ‖r‖ = ‖h_b − h_a‖  as far, anywhere
    direction          h_a + d, d = μ(y_b) − μ(y_a)  means over *other* entities of which y_b, y_a are true
    random direction   h_a + r, ‖r‖ = ‖d‖
    other direction    h_a + o ‖d‖ / ‖o‖           o a direction of another relation

Two runs follow for every edit. **Behaviour**: the source model goes on with its own prompt, in which the state is edited, and a question
that needs the attribute (" The capital is"). **Description**: the scope reads the edited state. A faithful reading says y_b where the
model behaves as if it were y_b, and y_a where it does not: criterion F2 of faithful verbalizers, after the probe swaps of Gurnee et al.
2026 (jacobian-lens) and interchange interventions (Geiger et al. 2021).

    odds       log p(y_b) − log p(y_a), nats, of either run
    agreement  the table behaviour × description over pairs, φ, Cohen's κ, and an exact one-sided p-value: given how often either changed
               under each edit, how likely they would change together as often (hypergeometric, edits as strata)

The description of a whole state is that of b by construction: only its behaviour is news. Along the direction both are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import comb, nan, sqrt
from typing import Any

import polars as pl
from jaxtyping import Float
from torch import Tensor

from patchscopes.controls.vectors import random_like
from patchscopes.core.errors import InputError
from patchscopes.core.words import names
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source
from patchscopes.scopes.written import Written, log_p, one_each, texts

EDITS = ("none", "state", "random state", "direction", "random direction", "other direction")


@dataclass(frozen=True)
class Agreement:
    """Pairs by whether behaviour and description changed to y_b. φ and κ are NaN where one of them is the same in all pairs."""

    both: int
    behaviour_only: int
    description_only: int
    neither: int
    phi: float
    kappa: float
    p_value: float


@dataclass(frozen=True, eq=False)
class Swap:
    """table: a row a pair and edit: `place`, `partner`, `edit`; `behaviour` and `description`, the texts; `behaviour_new` and
    `behaviour_old`, whether y_b and y_a are said, `description_new`, `description_old`; `behaviour_odds`, `description_odds`; `known`:
    whether both say y_a of the state as it is."""

    table: pl.DataFrame

    @property
    def rates(self) -> pl.DataFrame:
        """A row an edit, over known pairs: `edit`, `pairs`, shares that say y_b and y_a, mean odds."""
        columns = [pl.col(f"{run}_{what}").mean() for run in ("behaviour", "description") for what in ("new", "old", "odds")]
        known = self.table.filter(pl.col("known"))
        return known.group_by("edit", maintain_order=True).agg(pl.len().alias("pairs"), *columns)

    def agreement(self, *edits: str) -> Agreement:
        """Of known pairs under these edits (all but "none" if none is named)."""
        chosen = edits or EDITS[1:]
        if unknown := sorted(set(chosen) - set(EDITS)):
            raise InputError(f"unknown edits {', '.join(unknown)}; expected some of {', '.join(EDITS)}")
        some = self.table.filter(pl.col("known"), pl.col("edit").is_in(chosen))
        return agreement_of(some["behaviour_new"].to_list(), some["description_new"].to_list(), some["edit"].to_list())


def causal_swap(
    source: Source | Sequence[Source],
    scope: Patchscope,
    answers: Sequence[str],
    question: str,
    pairs: Sequence[tuple[int, int]],
    *,
    entities: Sequence[Hashable] | None = None,
    others: Float[Tensor, "other *stream d_model"] | None = None,
    says: Callable[[str, str], bool] = names,
    seed: int = 0,
) -> Swap:
    """The edits above for each of `pairs`, (place of a, place of b).

    answers    what is true of each place, as it would be said (" Paris"); places beyond the pairs serve the means
    question   what goes on behind each source's prompt (". The capital is")
    entities   of which entity each place is: its other places do not count as other entities. None: each is one of its own
    others     directions of another relation, for `other direction`; None: none
    """
    one = one_each(scope, source)
    n = len(one.places)
    who = list(range(n)) if entities is None else list(entities)
    if len(answers) != n or len(who) != n:
        raise InputError(f"{len(answers)} answers and {len(who)} entities were given for {n} places; expected one each")
    if wrong := [pair for pair in pairs if not all(0 <= k < n for k in pair)]:
        raise InputError(f"the pair {wrong[0]} names no places; expected two numbers from 0 to {n - 1}")
    directions = class_directions(one.states, answers, pairs, entities=who)
    rows, behaving, describing = list[dict[str, Any]](), list[Written](), list[Written]()
    for p, ((a, b), d) in enumerate(zip(pairs, directions, strict=True)):
        h = one.states[a]
        key = f"{seed} swap {one.places[a].digest} {one.places[b].digest}"
        edited: dict[str, Tensor | None] = {"none": None, "state": one.states[b]}
        edited["random state"] = h + random_like((one.states[b] - h)[None], f"{key} state")[0]
        if d is not None:
            edited |= {"direction": h + d, "random direction": h + random_like(d[None], key)[0]}
            if others is not None and len(others):
                o = others[p % len(others)].to(d)
                edited["other direction"] = h + o * (d.norm(dim=-1, keepdim=True) / o.norm(dim=-1, keepdim=True))
        for edit, state in edited.items():
            rows.append({"place": a, "partner": b, "edit": edit})
            behaving.append(one.source(a, question, state))
            describing.append(one.scope(a, h if state is None else state))
    before: list[int] = [row["place"] for row in rows]
    after: list[int] = [row["partner"] for row in rows]
    old, new = [answers[a] for a in before], [answers[b] for b in after]
    for name, runs in (("behaviour", behaving), ("description", describing)):
        said = texts(runs, scope)
        odds = [x - y for x, y in zip(log_p(runs, new, scope), log_p(runs, old, scope), strict=True)]
        for row, text, y_a, y_b, value in zip(rows, said, old, new, odds, strict=True):
            row |= {name: text, f"{name}_new": says(text, y_b), f"{name}_old": says(text, y_a), f"{name}_odds": value}
    plain = {(r["place"], r["partner"]): r["behaviour_old"] and r["description_old"] for r in rows if r["edit"] == "none"}
    for row in rows:
        row["known"] = plain[row["place"], row["partner"]]
    return Swap(pl.DataFrame(rows))


def class_directions(
    states: Float[Tensor, "place *stream d_model"],
    labels: Sequence[Hashable],
    pairs: Sequence[tuple[int, int]],
    *,
    entities: Sequence[Hashable],
) -> list[Float[Tensor, "*stream d_model"] | None]:
    """For each pair (a, b) the mean state of what has b's label minus that of what has a's, neither a nor b among them; None where
    nothing else has one of the labels, or both have the same."""
    found: list[Tensor | None] = []
    for a, b in pairs:
        out = (entities[a], entities[b])
        of = [[k for k in range(len(states)) if labels[k] == labels[at] and entities[k] not in out] for at in (a, b)]
        if labels[a] == labels[b] or not all(of):
            found.append(None)
            continue
        before, after = (states[some].double().mean(0) for some in of)
        found.append((after - before).to(states))
    return found


def agreement_of(first: Sequence[bool], second: Sequence[bool], strata: Sequence[Hashable]) -> Agreement:
    """Of two lists of yes and no. p: the chance of as many rows with both, were the second list shuffled within strata; exact."""
    if not len(first) == len(second) == len(strata):
        raise InputError(f"{len(first)}, {len(second)} and {len(strata)} rows cannot be compared; expected as many of each")
    n = len(first)
    cells = [
        sum(bool(x) == one and bool(y) == other for x, y in zip(first, second, strict=True))
        for one in (True, False)
        for other in (True, False)
    ]
    both, only_first, only_second, neither = cells
    yes, no, also, nor = both + only_first, only_second + neither, both + only_second, only_first + neither
    product = yes * no * also * nor
    phi = (both * neither - only_first * only_second) / sqrt(product) if product else nan
    chance = (yes * also + no * nor) / n**2 if n else nan
    kappa = ((both + neither) / n - chance) / (1 - chance) if product else nan
    of = [1.0]  # of[k]: the chance of k rows with both
    for stratum in dict.fromkeys(strata):
        rows = [k for k in range(n) if strata[k] == stratum]
        m, x, y = len(rows), sum(bool(first[k]) for k in rows), sum(bool(second[k]) for k in rows)
        here = [comb(x, k) * comb(m - x, y - k) / comb(m, y) for k in range(min(x, y) + 1)]
        of = [sum(of[i] * here[k - i] for i in range(len(of)) if 0 <= k - i < len(here)) for k in range(len(of) + len(here) - 1)]
    return Agreement(both, only_first, only_second, neither, phi, kappa, min(1.0, sum(of[both:])))
