"""Self-explaining directions: what a vector of your own means, in the model's words, at a length chosen by a criterion.

    f(v) = α ν v / ‖v‖        ν the median norm at ℓ*, α swept

A direction (a dictionary's feature, a probe, a difference) has no length of its own, and the length decides what is said: too short and
nothing is heard, too long and the model breaks. Kharlapenko et al. 2024, "Self-explaining SAE features", write it in SelfIE's place and
choose the length without labels, by self-similarity and entropy (`superscopes.criterion`).

What is chosen out of many lengths must be compared with a null that chooses out of as many: random directions, through the same search.
`p_value` is the rank of s − H / log₂ vocab (s self-similarity, H entropy in bits, both at the length chosen) among theirs. Random
directions are as long as the one that they are compared with; where every map sets the length itself, one set serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.controls.vectors import random_like
from patchscopes.core.errors import InputError
from patchscopes.maps import NormMatch
from patchscopes.model.model import Model, Prompt
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source
from patchscopes.scopes.superscopes import criterion

ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
N_NULL = 24  # random directions: the smallest p-value is 1/25


@dataclass(frozen=True)
class Explained:
    """table: a row a direction: `label`, `map` (the length chosen), `text`, `self_similarity`, `entropy` (bits), `p_value`.
    every: a row a direction and length, random directions among them (`null`); `norm`, of the direction as it was given, or of those that a
    random one is compared with."""

    table: pl.DataFrame
    every: pl.DataFrame


def lengths(model: Model, prompts: Prompt | Sequence[Prompt], alphas: Sequence[int | float] = ALPHAS) -> list[NormMatch]:
    """Maps to α times the median norm of what stands at each layer while the model reads `prompts`."""
    if not alphas:
        raise InputError("alphas is empty; expected at least one")
    usual = NormMatch.of(model.run(prompts, read="resid.*")).length
    return [NormMatch(float(alpha) * usual, name=f"{alpha:g} norms") for alpha in alphas]


def explain(
    model: Model,
    directions: Float[Tensor, "*row d_model"],
    scope: Patchscope,
    *,
    layer: int,
    labels: Sequence[str] = (),
    read: int = -1,
    n_null: int = N_NULL,
    seed: int = 0,
) -> Explained:
    """What `scope`, whose maps are the lengths to choose from, says of each direction at the length that the criterion chooses.

    layer: the layer that the directions live at; read: where self-similarity is taken; n_null: random directions for each length that
    directions have. InputError for labels that are not one for each direction, or not distinct.
    """
    rows = torch.atleast_2d(directions).detach().to(model.device, model.dtype)
    names = list(labels) or [f"direction {k}" for k in range(len(rows))]
    if len(set(names)) != len(rows) or len(names) != len(rows):
        raise InputError(f"there are {len(rows)} directions with the labels {names}; expected one for each, all different")
    norms, groups = rows.float().norm(dim=-1).tolist(), _groups(rows, scope)

    def measured(vectors: Tensor, called: Sequence[str], of: Sequence[int], null: bool) -> pl.DataFrame:
        source = Source.of_vectors(model, vectors, layer=layer, labels=called)
        known = pl.DataFrame({"label": called, "null": null, "group": [groups[k] for k in of], "norm": [norms[k] for k in of]})
        return criterion(scope, source, read=read).rename({"prompt_text": "label"}).join(known, on="label", maintain_order="left")

    every = [measured(rows, names, range(len(rows)), False)]
    for first in dict.fromkeys(groups) if n_null else ():
        noise = random_like(rows[first : first + 1].expand(n_null, -1), f"{seed} directions")
        every.append(measured(noise, [f"random {k}" for k in range(n_null)], [first] * n_null, True))
    found = pl.concat(every)
    statistic = pl.col("self_similarity") - pl.col("entropy") / log2(model.vocab)
    found = found.with_columns(statistic=statistic)
    best = found.sort("criterion", descending=True, maintain_order=True).unique(
        ["label", "null", "group"], keep="first", maintain_order=True
    )
    own = best.filter(~pl.col("null"))
    p = []
    for statistic, first in own.select("statistic", "group").iter_rows():
        null = best.filter(pl.col("null"), pl.col("group") == first)["statistic"]
        p.append((1 + int((null >= statistic).sum())) / (n_null + 1) if n_null else None)
    texts = _texts(model, rows, names, scope, layer, dict(own.select("label", "map").iter_rows()))
    columns = ("label", "map", "self_similarity", "entropy")
    table = own.select(columns).with_columns(
        p_value=pl.Series(p, dtype=pl.Float64), text=pl.Series([texts[label] for label in own["label"]], dtype=pl.String)
    )
    order = {name: k for k, name in enumerate(names)}
    table = table.sort(pl.col("label").replace_strict(order, return_dtype=pl.Int64))
    return Explained(table, found.drop("group"))


def _groups(rows: Float[Tensor, "row d_model"], scope: Patchscope) -> list[int]:
    """Of each direction the number of the first with which it has its null in common: one as long, or any if no map minds the length."""
    maps = [scope.map] if callable(scope.map) else list(scope.map)
    if all(isinstance(f, NormMatch) and f.before is None for f in maps):
        return [0] * len(rows)
    first: dict[str, int] = {}
    return [first.setdefault(f"{norm:.5g}", k) for k, norm in enumerate(rows.float().norm(dim=-1).tolist())]


def _texts(
    model: Model, rows: Tensor, names: Sequence[str], scope: Patchscope, layer: int, chosen: dict[str, str]
) -> dict[str, str]:
    """What is said of each direction at its own length: nothing else is generated."""
    maps = [scope.map] if callable(scope.map) else list(scope.map)
    found = {}
    for f in maps:
        mine = [k for k, name in enumerate(names) if chosen[name] == f.name]
        if mine:
            source = Source.of_vectors(model, rows[mine], layer=layer, labels=[names[k] for k in mine])
            table = replace(scope, map=f)(source, controls=False).table
            found |= dict(table.select("prompt_text", "text").iter_rows())
    return found
