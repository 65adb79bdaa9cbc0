"""All the vectors that a batch of states must be compared with, for whatever reads plain tensors: trained verbalizers, adapters, probes.

A row's own drawn vectors hang on the seed, the kind and the row's numbers alone, so that a batch equals its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.controls.shuffle import shuffled
from patchscopes.controls.vectors import covariance_like, mean_of, random_like, zero_like
from patchscopes.core.errors import InputError, UnknownName, nearest

VECTOR_KINDS = ("zero", "map_of_zero", "mean", "random", "random_covariance", "shuffled_within", "shuffled_across")


def stand_ins(
    vectors: Float[Tensor, "row d_model"],
    kinds: Sequence[str],
    *,
    sample: Float[Tensor, "n d_model"] | None = None,
    groups: Sequence[Hashable] | None = None,
    clusters: Sequence[Hashable] | None = None,
    map: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """[row, d_model] of every kind asked for, of `VECTOR_KINDS`.

    sample    states whose mean and covariance are taken ("mean", "random_covariance"); None: those of the batch's other rows
    groups    the relation of each row ("shuffled_within", "shuffled_across"); None: all are of one
    clusters  the entity of each row (see `shuffled`)
    map       the learned map f, whose f(0) is "map_of_zero", as wide as f makes it; the other kinds are what f gets

    A row without a partner to be shuffled with is NaN: nothing stands in for it. UnknownName for a kind that is none.
    """
    for kind in kinds:
        if kind not in VECTOR_KINDS:
            raise UnknownName(f"unknown kind of vector {kind!r}. {nearest(kind, VECTOR_KINDS)}")
    if "map_of_zero" in kinds and map is None:
        raise InputError("map_of_zero is f(0), and no map was given; expected map=…")
    if vectors.ndim != 2:
        raise InputError(f"the vectors have the shape {tuple(vectors.shape)}; expected (row, d_model)")
    n = len(vectors)
    names = [hashlib.sha256(row.detach().double().cpu().contiguous().numpy().tobytes()).hexdigest() for row in vectors]

    def known(k: int) -> Tensor:
        return sample if sample is not None else torch.cat([vectors[:k], vectors[k + 1 :]])

    def of_rows(of: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([of(k) for k in range(n)]) if n else vectors

    def of_others(within: bool) -> Tensor:
        partners = shuffled(groups if groups is not None else [0] * n, within=within, clusters=clusters, seed=seed)
        return of_rows(lambda k: torch.full_like(vectors[k], torch.nan) if (j := partners[k]) is None else vectors[j])

    made: dict[str, Callable[[], Tensor]] = {
        "zero": lambda: zero_like(vectors),
        "map_of_zero": lambda: map(zero_like(vectors)) if map is not None else vectors,
        "mean": lambda: mean_of(sample).expand_as(vectors) if sample is not None else of_rows(lambda k: mean_of(known(k))),
        "random": lambda: of_rows(lambda k: random_like(vectors[k], f"{seed} random {names[k]}")),
        "random_covariance": lambda: of_rows(lambda k: covariance_like(vectors[k], known(k), f"{seed} covariance {names[k]}")),
        "shuffled_within": lambda: of_others(True),
        "shuffled_across": lambda: of_others(False),
    }
    return {kind: made[kind]() for kind in kinds}
