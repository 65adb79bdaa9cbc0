"""Are readings faithful? The four measures of `patchscopes.measures` on facts, at one cell (ℓ, ℓ*), as tables and a figure for a page.

For each relation: the entities where they are mentioned (the sentence ends there: states do not see what follows), through the relation in
words with x in the entity's place.

    swap             every entity gets the state of another, or is moved along the difference of the two objects' other entities; asked
                     in a sentence behind the mention (`follow_up`), does the model say the other object, and does the scope?
    dose             h + λ (h_b − h_a)
    reconstruction   within each relation, beside the entity's name
    prediction       of what the model says when asked in other words (`in_other_words`), beside what it says of the text itself

Intervals resample entities. Whoever is asked must know: pairs count where behaviour and description say the fact's own object at first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch

from patchscopes.core.errors import InputError
from patchscopes.evaluate import agreement
from patchscopes.evaluate.data import Item
from patchscopes.evaluate.faithfulness_page import Faithfulness, summed_up
from patchscopes.evaluate.scoring import names
from patchscopes.measures import (
    agreement_of,
    causal_swap,
    class_directions,
    dose_response,
    prediction,
    reconstruction,
)
from patchscopes.measures.swap import EDITS
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source
from patchscopes.scopes.written import one_each

DRAWS = 4
DOSES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
AWAY = re.compile(r"\s+(?:of|in|for|from|by|to|at)\s+\{x\}|\{x\}'s\s+")


@dataclass(frozen=True, eq=False)
class _Of:
    """What is measured of one relation. chosen: places of the items asked about; the others serve the means."""

    name: str
    items: tuple[Item, ...]
    chosen: tuple[int, ...]
    sources: tuple[Source, ...]
    scope: Patchscope
    states: torch.Tensor
    pairs: tuple[tuple[int, int], ...]

    def some(self, places: Sequence[int]) -> list[Source]:
        return [self.sources[k] for k in places]

    @property
    def answers(self) -> list[str]:
        return [f" {item.answers[0]}" for item in self.items]


def follow_up(item: Item) -> str | None:
    """A question behind the sentence that mentions the entity, without its name: ". The capital is"; None where there is no such."""
    asked = AWAY.sub(lambda found: "" if found[0].startswith(" ") else "Its ", item.target, count=1)
    return None if "{x}" in asked else f". {asked[:1].upper()}{asked[1:]}"


def in_other_words(item: Item) -> str:
    """The question in words that the scope does not use."""
    asked = item.target.replace("{x}", item.subject)
    return f"I am sure that {asked[:1].lower() if item.target.startswith('The ') else asked[:1]}{asked[1:]}"


def faithfulness(
    model: Model,
    items: Sequence[Item],
    cell: tuple[int, int],
    *,
    pool: Sequence[Item] = (),
    stop: Sequence[str] = (".",),
    tokens: int = 8,
    doses: Sequence[float] = DOSES,
    draws: int = DRAWS,
    question: Callable[[Item], str | None] = follow_up,
    asked: Callable[[Item], str] = in_other_words,
    seed: int = 0,
) -> Faithfulness:
    """The four measures of `items` at source layer cell[0] and target layer cell[1].

    pool: more items, whose states serve the means of those that have an object in common. InputError if no relation has three items.
    """
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.relation, item.target), []).append(item)
    found = [
        _of(
            model,
            relation,
            some,
            [one for one in pool if (one.relation, one.target) == (relation, target)],
            cell,
            stop,
            tokens,
            seed,
        )
        for (relation, target), some in groups.items()
        if len(some) >= 3
    ]
    if not found:
        raise InputError(f"no relation has three items among {len(items)}; readings are compared within a relation")
    swap, moved = _swaps(found, question, seed)
    dose = _doses(found, doses, draws, seed)
    built = _rebuilt(found, seed)
    told = _told(found, question, asked)
    return summed_up(cell, sum(len(one.chosen) for one in found), swap, moved, dose, built, told, seed)


def _of(
    model: Model,
    name: str,
    items: Sequence[Item],
    pool: Sequence[Item],
    cell: tuple[int, int],
    stop: Sequence[str],
    tokens: int,
    seed: int,
) -> _Of:
    """Items first, then what else the pool has."""
    every = tuple(dict.fromkeys([*items, *pool]))
    sources = []
    for item in every:
        whole = model.tokens(item.prompt)
        at = whole.position(item.at)
        sources.append(Source(model, whole.upto(at), -1, layer=cell[0]))
    scope = Patchscope(items[0].target, layer=cell[1], max_new_tokens=tokens, stop=stop)
    pairs = []
    for k in range(len(items)):
        partners = [
            j for j in range(len(every)) if every[j].answers[0] != every[k].answers[0] and every[j].cluster != every[k].cluster
        ]
        shared = [
            j for j in partners if _others(every, j, (j, k))
        ]  # with an object that others have, too: then there is a direction
        if partners:
            pairs.append((k, random.Random(f"{seed} pair {every[k].subject} {name}").choice(shared or partners)))
    states = one_each(scope, sources).states
    return _Of(name, every, tuple(range(len(items))), tuple(sources), scope, states, tuple(pairs))


def _others(items: Sequence[Item], k: int, out: tuple[int, int]) -> bool:
    away = {items[j].cluster for j in out}
    return any(one.answers[0] == items[k].answers[0] and one.cluster not in away for one in items)


def _swaps(
    found: Sequence[_Of], question: Callable[[Item], str | None], seed: int
) -> tuple[pl.DataFrame | None, list[dict[str, Any]]]:
    """(a row an edit: rates; a row an edit: agreement). None where no relation can be asked without the entity's name."""
    clusters = [[item.cluster for item in one.items] for one in found]
    directions = [
        class_directions(one.states, one.answers, one.pairs, entities=who) for one, who in zip(found, clusters, strict=True)
    ]
    known = [[d for d in some if d is not None] for some in directions]
    tables = []
    for r, (one, who) in enumerate(zip(found, clusters, strict=True)):
        asked = question(one.items[0])
        if asked is None or not one.pairs:
            continue
        other = next((known[(r + k) % len(found)] for k in range(1, len(found)) if known[(r + k) % len(found)]), [])
        others = torch.stack(other) if other else None
        swap = causal_swap(
            one.sources, one.scope, one.answers, asked, one.pairs, entities=who, others=others, says=names, seed=seed
        )
        of = pl.Series("cluster", [who[k] for k in swap.table["place"]])
        tables.append(swap.table.with_columns(of, relation=pl.lit(one.name)))
    if not tables:
        return None, []
    table = pl.concat(tables)
    known_pairs = table.filter(pl.col("known"))
    columns = [pl.col(f"{run}_{what}").mean() for run in ("behaviour", "description") for what in ("new", "old", "odds")]
    rates = known_pairs.group_by("edit").agg(pl.len().alias("pairs"), *columns)
    order = {edit: k for k, edit in enumerate(EDITS)}
    rates = rates.sort(pl.col("edit").replace_strict(order, return_dtype=pl.Int64))
    moved = []
    for name, edits in [*((edit, (edit,)) for edit in rates["edit"] if edit != "none"), ("all", EDITS[1:])]:
        some = known_pairs.filter(pl.col("edit").is_in(edits))
        strata = [f"{edit} {relation}" for edit, relation in some.select("edit", "relation").iter_rows()]
        one = agreement_of(some["behaviour_new"].to_list(), some["description_new"].to_list(), strata)
        moved.append({"edit": name, **vars(one)})
    every = known_pairs.filter(pl.col("edit") != "none")
    both = agreement.agreement(
        every["behaviour_new"].to_numpy(), every["description_new"].to_numpy(), every["cluster"].to_list(), seed=seed
    )
    moved[-1] |= {"kappa_low": both.kappa.low, "kappa_high": both.kappa.high}
    return rates, moved


def _doses(found: Sequence[_Of], doses: Sequence[float], draws: int, seed: int) -> pl.DataFrame:
    """The tables of all relations, with `cluster`; `p_value`, `tau` and `half` of each place beside its rows."""
    tables = []
    for one in found:
        if not one.pairs:
            continue
        before, after = [a for a, _ in one.pairs], [b for _, b in one.pairs]
        dose = dose_response(
            one.some(before),
            one.scope,
            one.states[after] - one.states[before],
            [one.answers[b] for b in after],
            instead_of=[one.answers[a] for a in before],
            doses=doses,
            draws=draws,
            says=names,
            seed=seed,
        )
        who = pl.DataFrame({"place": range(len(before)), "cluster": [one.items[a].cluster for a in before]})
        tables.append(dose.table.join(dose.places, on="place").join(who, on="place").with_columns(relation=pl.lit(one.name)))
    return pl.concat(tables) if tables else pl.DataFrame()


def _rebuilt(found: Sequence[_Of], seed: int) -> list[dict[str, Any]]:
    rows = []
    for one in found:
        words = [one.items[k].subject for k in one.chosen]
        built = reconstruction(one.some(one.chosen), one.scope, words=words, seed=seed)
        row: dict[str, Any] = {"relation": one.name, "items": len(words)}
        for name, of in (("reading", built.reading), ("words", built.words)):
            row |= {f"{name}_bits": of.bits, f"{name}_rank": of.rank, f"{name}_first": of.first, f"{name}_p": of.p_value}
        rows.append(row)
    return rows


def _told(found: Sequence[_Of], question: Callable[[Item], str | None], asked: Callable[[Item], str]) -> pl.DataFrame:
    tables = []
    for one in found:
        items = [one.items[k] for k in one.chosen]
        told = prediction(
            one.some(one.chosen),
            one.scope,
            [asked(item) for item in items],
            question=question(items[0]),
            entities=[item.cluster for item in items],
            says=names,
        ).table
        who = pl.DataFrame({"place": range(len(items)), "cluster": [item.cluster for item in items]})
        tables.append(told.join(who, on="place", maintain_order="left").with_columns(relation=pl.lit(one.name)))
    return pl.concat(tables)
