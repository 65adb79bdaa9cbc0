"""Self-explaining directions: what a vector of your own means, in the model's words, at a length chosen by a criterion.

    f(v) = α ν v / ‖v‖        ν the median norm at ℓ*, α swept

A direction (a dictionary's feature, a probe, a difference) has no length of its own, and the length decides what is said: too short and
nothing is heard, too long and the model breaks. Kharlapenko et al. 2024, "Self-explaining SAE features", write it in SelfIE's place and
choose the length without labels, by self-similarity and entropy (`superscopes.criterion`).

What is chosen out of many lengths must be compared with a null that chooses out of as many: random directions, through the same search.
`p_value` is the rank of s − H / log₂ vocab (s self-similarity, H entropy in bits, both at the length chosen) among theirs.
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
    every: a row a direction and length, random directions among them (`null`)."""

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

    layer: the layer that the directions live at; read: where self-similarity is taken
    """
    rows = torch.atleast_2d(directions).detach().to(model.device, model.dtype)
    names = list(labels) or [f"direction {k}" for k in range(len(rows))]
    noise = random_like(rows[:1].expand(n_null, -1), f"{seed} directions")
    every = []
    for vectors, called in ((rows, names), (noise, [f"random {k}" for k in range(n_null)])):
        if len(vectors):
            source = Source.of_vectors(model, vectors, layer=layer, labels=called)
            every.append(criterion(scope, source, read=read).with_columns(null=pl.lit(vectors is noise)))
    found = pl.concat(every).rename({"prompt_text": "label"})
    statistic = pl.col("self_similarity") - pl.col("entropy") / log2(model.vocab)
    found = found.with_columns(statistic=statistic)
    best = found.sort("criterion", descending=True, maintain_order=True).unique(
        ["label", "null"], keep="first", maintain_order=True
    )
    null = torch.tensor(best.filter("null")["statistic"].to_list(), dtype=torch.float64)
    own = best.filter(~pl.col("null"))
    p = [(1 + int((null >= one).sum())) / (n_null + 1) for one in own["statistic"]] if n_null else [None] * len(own)
    texts = _texts(model, rows, names, scope, layer, dict(own.select("label", "map").iter_rows()))
    columns = ("label", "map", "self_similarity", "entropy")
    table = own.select(columns).with_columns(
        p_value=pl.Series(p, dtype=pl.Float64), text=pl.Series([texts[label] for label in own["label"]], dtype=pl.String)
    )
    order = {name: k for k, name in enumerate(names)}
    table = table.sort(pl.col("label").replace_strict(order, return_dtype=pl.Int64))
    return Explained(table, found)


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
