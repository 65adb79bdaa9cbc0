"""Dose and response: does a reading follow the state, step by step?

    h(λ) = h + λ v        v a known direction: the difference of two entities' states, of two class means, a feature

Along v the described answer must become likelier under the scope, and be said from some λ on; along a random direction of v's length it
must not. (Criterion F1 of faithful verbalizers; dose and response as in Turner et al. 2023, "Activation addition".)

    log_p      log p (nats) of the answer after the target prompt, teacher-forced: a continuous curve
    says       whether the greedy text says the answer
    tau        Kendall's τ of log_p over λ, with its exact one-sided p-value (all orders equally likely)
    area       mean over λ > 0 of log_p(λ) − log_p(0); `p_value`: its rank among the random directions', 1/(draws + 1) at best
    half       the λ at which the answer becomes likelier than the one that it replaces (between two doses linear); null if it never
               does, or is so from the start

τ alone proves little: along a random direction the curve is smooth too, and a smooth curve is often monotone; and where the answer is
certain there is no order left. The area's rank among random directions is what counts. λ beyond what the model ever saw breaks the state,
and then nothing is said of v either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, factorial, isnan, nan
from typing import Any

import polars as pl
from jaxtyping import Float
from torch import Tensor

from patchscopes.controls.vectors import random_like
from patchscopes.core.errors import InputError, VectorError
from patchscopes.core.words import names
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source
from patchscopes.scopes.written import Written, log_p, one_each, texts

DOSES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
DRAWS = 8


@dataclass(frozen=True, eq=False)
class Dose:
    """table: a row a place, direction and dose: `place`, `direction` ("v" or "random"), `draw`, `dose`, `log_p`, `odds` (log p of the
    answer over that of the one it replaces, null without one), `text`, `says`."""

    table: pl.DataFrame

    @property
    def places(self) -> pl.DataFrame:
        """A row a place: `place`, `tau`, `tau_p`, `area`, `p_value`, `half`."""
        rows = []
        for (place,), one in self.table.group_by("place", maintain_order=True):
            own = one.filter(pl.col("direction") == "v").sort("dose")
            curve, doses = own["log_p"].to_list(), own["dose"].to_list()
            null = [
                _area(some["dose"].to_list(), some["log_p"].to_list())
                for _, some in one.filter(pl.col("direction") == "random").group_by("draw", maintain_order=True)
            ]
            tau, p = kendall(curve)
            area = _area(doses, curve)
            rank = (1 + sum(other >= area for other in null)) / (len(null) + 1) if null else None
            rows.append(
                {
                    "place": place,
                    "tau": tau,
                    "tau_p": p,
                    "area": area,
                    "p_value": rank,
                    "half": _half(doses, own["odds"].to_list()),
                }
            )
        return pl.DataFrame(rows, schema_overrides={"p_value": pl.Float64, "half": pl.Float64})

    @property
    def curve(self) -> pl.DataFrame:
        """Means over places (and draws): `direction`, `dose`, `log_p`, `odds`, `says`, a share."""
        means = self.table.group_by("direction", "dose").agg(pl.col("log_p", "odds").mean(), pl.col("says").mean())
        return means.sort("direction", "dose", descending=[True, False])


def dose_response(
    source: Source | Sequence[Source],
    scope: Patchscope,
    v: Float[Tensor, "*place_stream d_model"],
    answers: Sequence[str],
    *,
    instead_of: Sequence[str] | None = None,
    doses: Sequence[float] = DOSES,
    draws: int = DRAWS,
    says: Callable[[str, str], bool] = names,
    seed: int = 0,
) -> Dose:
    """What `scope` says of h + λ v at every dose, for every place of the sources, beside `draws` random directions of v's length.

    v: one direction, or one for each place; answers: for each place what v should bring forth, as it would be said (" Paris");
    instead_of: what is said without it. InputError for lists of other lengths, and for doses that are not several and different.
    """
    one = one_each(scope, source)
    n = len(one.places)
    grid = sorted(float(dose) for dose in doses)
    if len(grid) < 2 or len(set(grid)) < len(grid) or draws < 0:
        raise InputError(f"doses are {list(doses)} with {draws} draws; expected two or more different doses, and 0 or more draws")
    for name, some in (("answers", answers), ("instead_of", instead_of or answers)):
        if len(some) != n:
            raise InputError(f"{len(some)} {name} were given for {n} places; expected one each")
    if v.shape not in (one.states.shape[-1:], one.states.shape):
        raise VectorError(
            f"v has the shape {tuple(v.shape)}; expected one direction {tuple(one.states.shape[-1:])} or {tuple(one.states.shape)}"
        )
    along = v.to(one.states).expand_as(one.states)
    rows, runs = list[dict[str, Any]](), list[Written]()
    for k in range(n):
        noise = random_like(along[k : k + 1].expand(draws, *along[k].shape), f"{seed} dose {one.places[k].digest}")
        for direction, draw, d in [("v", 0, along[k]), *(("random", i, d) for i, d in enumerate(noise))]:
            for dose in grid:
                rows.append({"place": k, "direction": direction, "draw": draw, "dose": dose})
                runs.append(one.scope(k, one.states[k] + dose * d))
    of: list[int] = [row["place"] for row in rows]
    likely = log_p(runs, [answers[k] for k in of], scope)
    before = log_p(runs, [instead_of[k] for k in of], scope) if instead_of is not None else None
    said = texts(runs, scope)
    for i, row in enumerate(rows):
        odds = None if before is None else likely[i] - before[i]
        row |= {"log_p": likely[i], "odds": odds, "text": said[i], "says": says(said[i], answers[of[i]])}
    return Dose(pl.DataFrame(rows, schema_overrides={"odds": pl.Float64}))


def kendall(curve: Sequence[float]) -> tuple[float, float]:
    """(Kendall's τ of a curve with its order, the share of all orders at least as much in order). Ties count for neither."""
    n = len(curve)
    total = n * (n - 1) // 2
    apart = [(curve[j] > curve[i]) - (curve[j] < curve[i]) for i in range(n) for j in range(i + 1, n)]
    s = sum(apart)
    counts = [1]  # of orders of 1, 2, … things with so many pairs out of order
    for k in range(2, n + 1):
        counts = [sum(counts[max(0, i - k + 1) : i + 1]) for i in range(len(counts) + k - 1)]
    return s / total, sum(counts[: ceil((total - s) / 2) + 1]) / factorial(n)


def _area(doses: Sequence[float], curve: Sequence[float]) -> float:
    """Mean over doses above 0 of how far the curve stands above that at the dose nearest to 0."""
    at = min(range(len(doses)), key=lambda k: abs(doses[k]))
    above = [value - curve[at] for dose, value in zip(doses, curve, strict=True) if dose > 0]
    return sum(above) / len(above) if above else nan


def _half(doses: Sequence[float], odds: Sequence[float | None]) -> float | None:
    """Where the odds first pass 0 upwards."""
    known = [(dose, value) for dose, value in zip(doses, odds, strict=True) if value is not None and not isnan(value)]
    if known and known[0][1] >= 0:
        return None
    for (low, below), (high, above) in pairwise(known):
        if below < 0 <= above:
            return low + (high - low) * -below / (above - below)
    return None
