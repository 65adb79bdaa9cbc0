"""Fit maps between layers, and say how good they are on text that they have not seen.

    ps.maps.fit(model, texts, [(2, 8), (4, 8)])                between layers of one model
    ps.maps.fit(small, texts, [(2, 5)], target=large)          between two, of any widths and tokenizers (positions aligned by characters)
    ps.maps.fit(model, texts, "last", ahead=2)                 to the states two tokens later: the linear future lens

All pairs of layers come from the same passes, each text run once in each model; what is kept is said in `least_squares`. Beside the
held-out error of each map stands what it must be compared with: the **refit floor** (the least error that any affine map could have on
the held-out text: that of one fitted to this very text), the identity, and the mean of the targets. Errors are shares of the targets'
variance, 1 − R²:

    error = Σ ‖y − f(x)‖² / Σ ‖y − ȳ‖²

Ghandeharioun et al. 2024, 4.1 and 4.4, fit such maps by `lstsq` on one position of each of 10,000 texts, without a ridge, to *normed* last
states, and report no held-out error. Here the last layer is raw, so that the model's own final norm comes after the map, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl
import torch
from torch import Tensor

from patchscopes.core.errors import InputError, UnknownName, nearest
from patchscopes.maps.by_layer import ByLayer
from patchscopes.maps.files import save_map
from patchscopes.maps.least_squares import Moments, Sums, as_double
from patchscopes.maps.map import Map, map_between
from patchscopes.maps.states import Pairs, States, Text, counts, digest_of_texts, split, states
from patchscopes.model.model import Model

Kind = Literal["affine", "low_rank", "per_direction", "mean"]
RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # what "auto" chooses from
Progress = Callable[[int, int, str], None]  # (done, of, what)


@dataclass(frozen=True)
class FitReport:
    """How good a map is on held-out text. error, floor, identity, mean: shares of the targets' variance; None where there is none.

    n           held-out tokens                     n_fitted   tokens that it was fitted to
    cosine      mean of cos(f(x), y)                rank       of the sources' covariance, of d_source
    floor       the refit floor                     condition  number of that covariance, with the ridge
    identity    error of f(x) = x                   ridge      in units of the mean variance
    mean        error of the mean that was fitted   note       what to know about all this
    """

    source_layer: int
    target_layer: int
    n: int
    error: float
    cosine: float
    floor: float
    identity: float | None
    mean: float | None = None
    n_fitted: int | None = None
    rank: int | None = None
    condition: float | None = None
    ridge: float | None = None
    note: str = ""

    @property
    def r2(self) -> float:
        """1 − error."""
        return 1 - self.error


@dataclass(frozen=True, eq=False)
class Fitted:
    """Maps, how good they are, and where they come from. `map` goes into a Patchscope as it is."""

    map: ByLayer
    reports: tuple[FitReport, ...]
    provenance: dict[str, Any] = field(repr=False)

    def __getitem__(self, pair: tuple[int, int]) -> Map:
        """The map from ℓ to ℓ*."""
        return self.map.for_layers(*pair)

    @property
    def table(self) -> pl.DataFrame:
        """The reports, a row a pair of layers."""
        return pl.DataFrame([{**asdict(one), "r2": one.r2} for one in self.reports], infer_schema_length=None)

    def save(self, path: str | Path) -> None:
        """As safetensors with provenance, for `load_map`."""
        save_map(path, self.map, self.provenance)


def fit(
    model: Model,
    texts: Sequence[str],
    layers: str | Pairs = "last",
    *,
    target: Model | None = None,
    kind: Kind = "affine",
    rank: int | None = None,
    ridge: float | Literal["auto"] = "auto",
    positions: int | None = None,
    held_out: float = 0.2,
    ahead: int = 0,
    shuffled: bool = False,
    site: str = "resid",
    seed: int = 0,
    progress: Progress = lambda done, of, what: None,
) -> Fitted:
    """Fit a map for every pair of layers.

    layers     pairs (ℓ, ℓ*); or "last" (every ℓ into L, the linear shortcuts of Din et al. 2023), "same", "all"
    target     M*, if it is another model
    kind       "affine", "low_rank" (with `rank`), "per_direction" (a gain for each coordinate), "mean"
    ridge      "auto": the one of `RIDGES` with which a map of this kind does best from one half of the fitted text to the other, for each
               pair
    positions  at most so many of each text, drawn; None: all but the first
    held_out   share of the texts that the maps never see
    ahead      N: from ℓ at position t to ℓ* at t + N of the same text (the linear future lens), in tokens of the target model
    shuffled   fit to pairs that do not belong together, each source with some other position's target: a control, which knows what the
               target's states are like and nothing of what was read. The reports are about true pairs

    UnknownName, InputError or LayerError for what cannot be fitted; VectorError where states are not finite, or for gains between widths.
    """
    _require(kind, rank, ridge)
    where = states(model, target, layers, site, ahead)
    fitted, away = split(texts, held_out, seed)
    seen = where.texts(fitted, positions, seed)
    read = replace(where, dealt=seed) if shuffled else where
    halves = [
        _moments(read, half, progress, f"reading, {which} half")
        for which, half in zip(("first", "second"), _halves(seen), strict=True)
    ]
    maps: dict[tuple[int, int], Map] = {}
    facts: dict[tuple[int, int], dict[str, Any]] = {}
    means: dict[tuple[int, int], Map] = {}
    whole = _joined(*halves)
    for pair in where.pairs:
        lam = _best_ridge(halves[0][pair], halves[1][pair], kind, rank) if ridge == "auto" else float(ridge)
        moments = whole[pair]
        maps[pair] = _solved(moments, kind, rank, lam)
        means[pair] = moments.mean()
        c = moments.conditioning(lam)
        note = c.note if kind in ("affine", "low_rank") else ""
        facts[pair] = {"n_fitted": moments.n, "rank": c.rank, "condition": c.condition, "ridge": lam, "note": note}
    fresh = where.texts(away, positions, seed)
    reports = tuple(_measured(where, fresh, maps, means, facts, progress))
    provenance = {
        "source_model": model.provenance(),
        "target_model": None if where.target is model else where.target.provenance(),
        "site": site,
        "ahead": ahead,
        "kind": kind,
        "texts": {"fitted": len(fitted), "held_out": len(away), "digest": digest_of_texts(texts)},
        "tokens": counts(seen),
        "tokens_held_out": counts(fresh),
        "shuffled": shuffled,
        "seed": seed,
        "reports": [asdict(one) for one in reports],
    }
    return Fitted(ByLayer(maps, "shuffled" if shuffled else kind.replace("_", "-")), reports, provenance)


def evaluate(
    f: Map,
    model: Model,
    texts: Sequence[str],
    layers: str | Pairs = "last",
    *,
    target: Model | None = None,
    ahead: int = 0,
    site: str = "resid",
    progress: Progress = lambda done, of, what: None,
) -> list[FitReport]:
    """How good any map is between these layers (and to `ahead` tokens later) on these texts: its error beside the refit floor and the
    identity."""
    where = states(model, target, layers, site, ahead)
    maps = {pair: map_between(f, *pair) for pair in where.pairs}
    return _measured(where, where.texts(texts, None, 0), maps, {}, {}, progress)


def _require(kind: object, rank: object, ridge: object) -> None:
    """UnknownName or InputError for settings of no map."""
    kinds = get_args(Kind)
    if kind not in kinds:
        raise UnknownName(f"unknown kind of map {kind!r}. {nearest(str(kind), kinds)}")
    if (rank is None) == (kind == "low_rank"):
        raise InputError(f"kind is {kind!r} and rank is {rank}; a rank belongs to low_rank, and low_rank to a rank")
    if ridge != "auto" and not (isinstance(ridge, int | float) and 0 <= ridge < float("inf")):
        raise InputError(f"the ridge is {ridge!r}; expected 'auto' or a number of at least 0")


def _halves(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Texts in two, alternately, and equal ones together: what stood in both halves would be known when the other is told. A single one
    has no second half; then nothing can be chosen."""
    number = {text: k for k, text in enumerate(dict.fromkeys(one.source.text for one in texts))}
    first, second = ([one for one in texts if number[one.source.text] % 2 == half] for half in (0, 1))
    return first, second


def _moments(where: States, texts: Sequence[Text], progress: Progress, what: str) -> dict[tuple[int, int], Moments]:
    sources = {layer: Sums(True) for layer in where.source_layers}
    targets = {layer: Sums(False) for layer in where.target_layers}
    found = {(s, t): Moments(sources[s], targets[t]) for s, t in where.pairs}
    done = 0
    for x, y, batch in where.chunks(texts):
        xs = {layer: sums.add(as_double(x[layer], f"layer {layer} of {where.source.name}")) for layer, sums in sources.items()}
        ys = {layer: sums.add(as_double(y[layer], f"layer {layer} of {where.target.name}")) for layer, sums in targets.items()}
        for (s, t), moments in found.items():
            moments.merge(xs[s], ys[t])
        done += len(batch)
        progress(done, len(texts), what)
    return found


def _joined(
    first: Mapping[tuple[int, int], Moments], second: Mapping[tuple[int, int], Moments]
) -> dict[tuple[int, int], Moments]:
    """Moments of both halves. Sums that pairs share stay shared, so that each is decomposed once."""
    known: dict[int, Sums] = {}

    def both(a: Sums, b: Sums) -> Sums:
        return known.setdefault(id(a), a.joined(b))

    found = {}
    for pair, a in first.items():
        b = second[pair]
        moments = Moments(both(a.source, b.source), both(a.target, b.target))
        moments.cross = a.cross_with(b)
        found[pair] = moments
    return found


def _best_ridge(a: Moments, b: Moments, kind: Kind, rank: int | None) -> float:
    """By the error on one half of a map of this kind that was fitted to the other, both ways round. 1e-3 if there are no two halves."""
    if kind == "mean":
        return 0.0  # it has no weight to hold down
    if a.n < 2 or b.n < 2:
        return 1e-3
    errors = {ridge: _across(a, b, kind, rank, ridge) + _across(b, a, kind, rank, ridge) for ridge in RIDGES}
    return min(RIDGES, key=lambda ridge: errors[ridge])


def _across(fitted: Moments, other: Moments, kind: Kind, rank: int | None, ridge: float) -> float:
    if kind == "per_direction":
        w = fitted.gains(ridge)
        return other.error(w, fitted.target.mean - w * fitted.source.mean)
    if rank is None:
        w = fitted.weight(ridge)
    else:
        up, down = fitted.factors(rank, ridge)
        w = up @ down
    return other.error(w, fitted.target.mean - w @ fitted.source.mean)


def _solved(moments: Moments, kind: Kind, rank: int | None, ridge: float) -> Map:
    if kind == "low_rank":
        assert rank is not None
        return moments.low_rank(rank, ridge)
    return {"affine": moments.affine, "per_direction": moments.per_direction, "mean": lambda _ridge: moments.mean()}[kind](ridge)


@torch.no_grad()
def _measured(
    where: States,
    texts: Sequence[Text],
    maps: Mapping[tuple[int, int], Map],
    means: Mapping[tuple[int, int], Map],
    facts: Mapping[tuple[int, int], dict[str, Any]],
    progress: Progress,
) -> list[FitReport]:
    """Run the texts once more, apply the maps and compare, vector by vector: nothing here trusts the sums."""
    sources = {layer: Sums(True) for layer in where.source_layers}
    targets = {layer: Sums(False) for layer in where.target_layers}
    moments = {(s, t): Moments(sources[s], targets[t]) for s, t in where.pairs}
    squares = {pair: torch.zeros(4, dtype=torch.float64) for pair in where.pairs}  # of the map, of identity and mean; cosines
    done = 0
    for x, y, batch in where.chunks(texts):
        xs = {layer: sums.add(as_double(x[layer], f"layer {layer}")) for layer, sums in sources.items()}
        ys = {layer: sums.add(as_double(y[layer], f"layer {layer}")) for layer, sums in targets.items()}
        for pair in where.pairs:
            h, wanted = x[pair[0]], y[pair[1]]
            made = maps[pair](h)
            if made.shape != wanted.shape:
                raise InputError(
                    f"the map {maps[pair].name!r} makes vectors {made.shape[-1]} wide; layer {pair[1]} of {where.target.name} is "
                    f"{wanted.shape[-1]} wide"
                )
            same = _square(h, wanted) if h.shape == wanted.shape else torch.nan
            average = _square(means[pair](h), wanted) if pair in means else torch.nan
            cosines = torch.nn.functional.cosine_similarity(made.double().cpu(), wanted.double().cpu(), dim=-1).sum()
            squares[pair] += torch.tensor([_square(made, wanted), same, average, float(cosines)], dtype=torch.float64)
            moments[pair].merge(xs[pair[0]], ys[pair[1]])
        done += len(batch)
        progress(done, len(texts), "held-out text")
    found = []
    for pair, one in moments.items():
        spread = one.spread or torch.nan  # without variance in the targets there is no share of it
        error, same, average, cosine = squares[pair].tolist()
        own = dict(facts.get(pair, {}))
        notes = [own.pop("note", "")]
        if one.n <= len(one.source.mean):
            notes.append(f"the floor is 0 by counting alone: {one.n} held-out tokens for {len(one.source.mean)} dimensions")
        found.append(
            FitReport(
                *pair,
                n=one.n,
                error=error / spread,
                cosine=cosine / one.n,
                floor=one.floor() / spread,
                identity=None if same != same else same / spread,
                mean=None if average != average else average / spread,
                note="; ".join(filter(None, notes)),
                **own,
            )
        )
    return found


def _square(made: Tensor, wanted: Tensor) -> float:
    return (
        float((made.double() - wanted.double()).square().sum())
        if made.device.type != "mps"
        else _square(made.cpu(), wanted.cpu())
    )
