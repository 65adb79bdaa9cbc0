"""What the four measures of faithfulness found, as figures, tables and plain words (see `evaluate.faithfulness`).

swap: a row an edit, rates over pairs; moved: a row an edit, agreement of behaviour and description; dose and told: the measures' own rows
with `relation` and `cluster`; built: a row a relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from patchscopes.evaluate import statistics
from patchscopes.evaluate.frame import Line, Lines, Table
from patchscopes.evaluate.paired import Compared, compared
from patchscopes.evaluate.statistics import Estimate
from patchscopes.measures.prediction import KINDS

_TOLD = {
    "reading": "the state",
    "asked": "the text and the question, no scope",
    "text": "the text in the placeholder's place",
    "nothing": "nothing patched",
    "random": "a random vector",
    "mean": "the mean of other states",
    "shuffled": "another entity's state",
    "majority": "the commonest answer of the others",
}


@dataclass(frozen=True)
class Faithfulness:
    """scores: all figures, as plain JSON; claims: what may be said, in plain words."""

    claims: tuple[str, ...]
    scores: dict[str, Any]
    tables: tuple[Table, ...]
    figures: tuple[Lines, ...]


def summed_up(
    cell: tuple[int, int],
    items: int,
    swap: pl.DataFrame | None,
    moved: Sequence[dict[str, Any]],
    dose: pl.DataFrame,
    built: Sequence[dict[str, Any]],
    told: pl.DataFrame,
    seed: int,
) -> Faithfulness:
    """All of it (see the module's docstring). cell: (ℓ, ℓ*); items: how many were asked about; seed: of the intervals."""
    tables = (_swap_table(swap), _agreement_table(moved), _rebuilt_table(built), _told_table(told, seed))
    scores = {
        "cell": {"layer": cell[0], "target_layer": cell[1]},
        "items": items,
        "swap": swap.to_dicts() if swap is not None else [],
        "agreement": moved,
        "dose": _dose_scores(dose, seed),
        "reconstruction": built,
        "prediction": {kind: _share(told, kind, seed).to_json() for kind in _kinds(told)},
    }
    return Faithfulness(_claims(swap, moved, scores, told, seed), scores, tables, (_figure(dose, seed),))


def _kinds(told: pl.DataFrame) -> list[str]:
    return [kind for kind in KINDS if kind in set(told["kind"])]


def _share(told: pl.DataFrame, kind: str, seed: int, column: str = "says") -> Estimate:
    some = told.filter(pl.col("kind") == kind)
    return statistics.rate(some[column].cast(pl.Float64).to_numpy(), some["cluster"].to_list(), seed=seed)


def _against(told: pl.DataFrame, kind: str, seed: int) -> Compared:
    """The reading and a kind, item by item."""
    keys = ["relation", "place", "cluster"]
    one, other = (told.filter(pl.col("kind") == which).select(*keys, "says") for which in ("reading", kind))
    both = one.join(other, on=keys, suffix="_other")
    return compared(both["says"].to_numpy(), both["says_other"].to_numpy(), both["cluster"].to_list(), seed=seed)


def _dose_scores(dose: pl.DataFrame, seed: int) -> dict[str, Any]:
    if dose.is_empty():
        return {}
    places, chance = dose.unique(["relation", "place"], maintain_order=True), 1 / (1 + _draws(dose))
    curves = {
        direction: [{"dose": x, **share.to_json(), "log_p": log_p} for x, share, log_p in _curve(dose, direction, seed)]
        for direction in ("v", "random")
    }
    above = [p <= chance + 1e-9 for p in places["p_value"].drop_nulls()]
    half = places["half"].drop_nulls().to_numpy()
    return {
        "pairs": len(places),
        "tau": float(np.mean(places["tau"].to_numpy())),
        "half": float(np.median(half)) if len(half) else None,
        "above_all_random": float(np.mean(above)) if above else None,
        "by_chance": chance,
        "curves": curves,
    }


def _draws(dose: pl.DataFrame) -> int:
    return dose.filter(pl.col("direction") == "random")["draw"].n_unique()


def _curve(dose: pl.DataFrame, direction: str, seed: int) -> list[tuple[float, Estimate, float]]:
    some = dose.filter(pl.col("direction") == direction)
    found = []
    for (x,), rows in some.sort("dose").group_by("dose", maintain_order=True):
        share = statistics.rate(rows["says"].cast(pl.Float64).to_numpy(), rows["cluster"].to_list(), seed=seed)
        found.append((float(x), share, float(np.mean(rows["log_p"].to_numpy()))))
    return found


def _figure(dose: pl.DataFrame, seed: int) -> Lines:
    lines = []
    for direction, name in (("v", "towards the other entity"), ("random", "random direction, as long")):
        curve = _curve(dose, direction, seed) if not dose.is_empty() else []
        if curve:
            shares = [share for _, share, _ in curve]
            low, high = tuple(s.low for s in shares), tuple(s.high for s in shares)
            lines.append(
                Line(name, tuple(x for x, *_ in curve), tuple(s.value for s in shares), low, high, dashed=direction == "random")
            )
    return Lines("dose", "Dose and response: readings that say the other entity's object", "λ", "share", tuple(lines), (0.0, 1.0))


def _swap_table(swap: pl.DataFrame | None) -> Table:
    columns = ("edit", "pairs", "behaviour: new", "behaviour: old", "description: new", "description: old")
    fields = ("edit", "pairs", "behaviour_new", "behaviour_old", "description_new", "description_old")
    rows = tuple(tuple(row[name] for name in fields) for row in swap.to_dicts()) if swap is not None else ()
    caption = "Causal swap: where the state is edited, who says the other entity's object (new), who still says its own (old)"
    return Table("faithfulness-swap", caption, columns, rows, columns[2:])


def _agreement_table(moved: Sequence[dict[str, Any]]) -> Table:
    columns = ("edit", "both", "behaviour only", "description only", "neither", "φ", "κ", "p")
    rows = tuple(tuple(row.values())[: len(columns)] for row in moved)
    caption = "Pairs by whether behaviour and description changed to the other object; p: exact, within edits and relations"
    return Table("faithfulness-agreement", caption, columns, rows)


def _rebuilt_table(built: Sequence[dict[str, Any]]) -> Table:
    columns = ("relation", "items", "bits", "rank", "first", "p", "name: bits", "name: rank", "name: first", "name: p")
    rows = tuple(tuple(row.values()) for row in built)
    caption = (
        "Reconstruction: how well the reading, or the entity's name, tells the state from those of the relation's other entities"
    )
    return Table("faithfulness-reconstruction", caption, columns, rows, ("first", "name: first"))


def _told_table(told: pl.DataFrame, seed: int) -> Table:
    columns = ("what is read", "items", "says", "low", "high", "next token", "log p", "p against the state")
    rows = []
    for kind in _kinds(told):
        says, next_, some = (
            _share(told, kind, seed),
            _share(told, kind, seed, "first"),
            told.filter(pl.col("kind") == kind)["log_p"],
        )
        p = None if kind == "reading" else _against(told, kind, seed).p_clustered
        rows.append((_TOLD[kind], says.n, says.value, says.low, says.high, next_.value, some.mean(), p))
    caption = (
        "Prediction: readings that foretell what the model answers when asked in other words; p: sign flips of whole entities"
    )
    return Table("faithfulness-prediction", caption, columns, tuple(rows), ("says", "low", "high", "next token"))


def _claims(
    swap: pl.DataFrame | None, moved: Sequence[dict[str, Any]], scores: dict[str, Any], told: pl.DataFrame, seed: int
) -> tuple[str, ...]:
    claims = []
    if swap is not None and swap.is_empty():
        claims.append("Behaviour and description never both say the fact's own object, so there is nothing to swap.")
    if swap is not None and (rates := {row["edit"]: row for row in swap.to_dicts()}):
        for edit, of in (
            ("direction", "along the difference of the objects' other entities"),
            ("state", "to the other entity's state"),
        ):
            if edit in rates and f"random {edit}" in rates:
                row, null = rates[edit], rates[f"random {edit}"]
                claims.append(
                    f"Moved {of}, {row['behaviour_new']:.0%} of {row['pairs']} states change the model's answer to the other object, and "
                    f"{row['description_new']:.0%} of their readings; moved as far at random, {null['behaviour_new']:.0%} and "
                    f"{null['description_new']:.0%}."
                )
        every = moved[-1]
        between = f"{every['kappa']:.2f}, {every['kappa_low']:.2f} to {every['kappa_high']:.2f}"
        kappa = f" (κ = {between})" if every["kappa"] == every["kappa"] else ""
        claims.append(
            f"Over all edits behaviour and description agree in {every['both'] + every['neither']} of "
            f"{sum(every[k] for k in ('both', 'behaviour_only', 'description_only', 'neither'))} cases{kappa}; the "
            f"description alone changed in {every['description_only']}, the behaviour alone in {every['behaviour_only']}."
        )
    if (dose := scores["dose"]) and dose["above_all_random"] is not None:
        half = "never" if dose["half"] is None else f"at λ = {dose['half']:.2f} (median)"
        claims.append(
            f"Towards another entity's state its object becomes the likelier one {half}; in {dose['above_all_random']:.0%} of "
            f"{dose['pairs']} cases it gains more than along every random direction ({dose['by_chance']:.0%} by chance)."
        )
    bits = [(row["items"], row["reading_bits"], row["words_bits"]) for row in scores["reconstruction"]]
    n, reading, words = (np.array(column, float) for column in zip(*bits, strict=True))
    if not (np.isnan(reading).all() or np.isnan(words).all()):
        claims.append(
            f"Put into neutral sentences, readings bring back {np.nanmean(reading):.2f} bits of which entity of its relation a state is "
            f"of; the entity's name {np.nanmean(words):.2f}, of at most {np.log2(n).mean():.2f}."
        )
    best = "asked" if "asked" in set(told["kind"]) else "text"
    against = _against(told, best, seed)
    claims.append(
        f"Readings foretell {_share(told, 'reading', seed)} of the model's own answers in other words; {_TOLD[best]}: "
        f"{_share(told, best, seed)}. The difference is {against.difference}, p = {against.p_clustered:.2g}; another entity's "
        f"state: {_share(told, 'shuffled', seed)}."
    )
    return tuple(claims)
