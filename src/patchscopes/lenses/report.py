"""How well a lens says, from a lower layer, what the model says in the end; beside the logit lens, which has nothing to learn.

    KL = E Σᵥ p_L(v) log2 p_L(v) / p_ℓ(v)     bits between the model's own distribution and the lens'
    CE = −E log2 p_ℓ(next token)              bits a token
    top1 = E [argmax p_ℓ = argmax p_L]        precision@1 of Ghandeharioun et al. 2024, 4.1

over all real tokens of the texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl
import torch
from torch import Tensor

from patchscopes.core.errors import InputError, RefusedError, VectorError
from patchscopes.lenses.windows import Window, batches, require_one_stream, rows_at_once, see
from patchscopes.maps import Identity, Map, map_between
from patchscopes.model.model import Model

Progress = Callable[[int, int, str], None]  # (done, of, what)


@dataclass(frozen=True)
class LayerReport:
    """One layer: kl and ce in bits, top1 a share; of the lens, and of the logit lens. floor: the KL of a lens refitted to the very text
    that is measured on, in bits; None where none was."""

    layer: int
    kl: float
    logit_lens_kl: float
    ce: float
    logit_lens_ce: float
    top1: float
    logit_lens_top1: float
    floor: float | None = None


@dataclass(frozen=True)
class LensReport:
    """Every layer of a lens. model_ce: bits a token of the model itself; n: tokens."""

    layers: tuple[LayerReport, ...]
    model_ce: float
    n: int

    def __getitem__(self, layer: int) -> LayerReport:
        """Of one layer."""
        return next(one for one in self.layers if one.layer == layer)

    @property
    def table(self) -> pl.DataFrame:
        """A row a layer."""
        return pl.DataFrame([asdict(one) for one in self.layers], infer_schema_length=None)

    def with_floor(self, other: LensReport) -> LensReport:
        """The same, with the KL of `other`, a lens fitted to this very text, as the floor."""
        floors = {one.layer: one.kl for one in other.layers}
        return replace(self, layers=tuple(replace(one, floor=floors.get(one.layer)) for one in self.layers))


@torch.no_grad()
def measure(
    model: Model,
    lens: Map,
    some: Sequence[Window],
    layers: Sequence[int] | None = None,
    *,
    progress: Progress = lambda done, of, what: None,
) -> LensReport:
    """The report of a lens, a map into layer L, on windows. layers: None: all below L."""
    require_one_stream(model)
    layers = list(range(model.n_layers)) if layers is None else list(layers)
    if not layers or not some:
        raise InputError(f"{len(layers)} layers and {len(some)} windows were given; expected at least one of each")
    maps = {layer: map_between(lens, layer, model.n_layers) for layer in layers}
    require_width(model, maps)
    sums = {layer: torch.zeros(6, dtype=torch.float64) for layer in layers}
    own, n, n_next, done = 0.0, 0, 0, 0
    for batch in batches(some):
        seen = see(model, batch, layers)
        there = seen.following >= 0
        own -= float(seen.log_p[there].gather(1, seen.following[there, None]).double().sum())
        n, n_next = n + len(there), n_next + int(there.sum())
        for layer in layers:
            for rows in rows_at_once(model, len(there)):
                h, log_p, following = seen.h[layer][rows], seen.log_p[rows], seen.following[rows]
                for at, f in enumerate((maps[layer], Identity())):
                    sums[layer][at::2] += _sums(model.unembed(f(h)).float().log_softmax(-1), log_p, following)
        done += len(batch)
        progress(done, len(some), "measuring")
    bits = torch.tensor([n, n, n_next or math.nan, n_next or math.nan, n, n], dtype=torch.float64)
    bits[:4] *= math.log(2)
    return LensReport(
        tuple(LayerReport(layer, *(sums[layer] / bits).tolist()) for layer in layers), own / math.log(2) / max(n_next, 1), n
    )


def require_width(model: Model, maps: dict[int, Map]) -> None:
    """VectorError if a map takes or makes vectors of another width than the model's."""
    for layer, f in maps.items():
        out = f(torch.ones(1, model.d_model))
        if out.shape[-1] != model.d_model:
            raise VectorError(
                f"the lens makes vectors {out.shape[-1]} wide at layer {layer}; {model.name} is {model.d_model} wide"
            )


def made_from(model: Model, provenance: Mapping[str, Any]) -> bool:
    """Whether a lens was made here from these very weights, all of them hashed: then nothing needs to be compared."""
    made = provenance.get("model")
    found = made.get("weight_hash") if isinstance(made, Mapping) else None
    return isinstance(found, str) and found.startswith("sha256:") and found == model.weight_hash


def middle(n_layers: int) -> list[int]:
    """Layers L/4 to 3L/4, where a lens has most to do; at least one."""
    return sorted({min(max(1, round(n_layers * k / 8)), max(n_layers - 1, 0)) for k in range(2, 7)})


def require_closer(model: Model, lens: Map, some: Sequence[Window], what: str) -> LensReport:
    """A report of the middle layers. RefusedError if the lens is, over them, further from what the model says than the logit lens."""
    report = measure(model, lens, some, middle(model.n_layers))
    mine, plain = (math.fsum(getattr(one, name) for one in report.layers) for name in ("kl", "logit_lens_kl"))
    if not mine <= plain:
        figures = "; ".join(f"layer {one.layer}: {one.kl:.2f} against {one.logit_lens_kl:.2f}" for one in report.layers)
        raise RefusedError(
            f"{what} does not fit {model.name}: what it says is further from what the model says in the end than the logit lens, in bits "
            f"(KL) {figures}. It was most likely made for another model. Pass check=False to use it all the same"
        )
    return report


def _sums(log_q: Tensor, log_p: Tensor, following: Tensor) -> Tensor:
    """KL and CE in nats, and how often both say the same next, summed over rows."""
    kl = (log_p.exp() * (log_p - log_q)).nan_to_num(posinf=torch.inf).double().sum()  # 0 · (−∞) where a head rules tokens out
    there = following >= 0
    ce = -log_q[there].gather(1, following[there, None]).double().sum()
    same = (log_q.argmax(-1) == log_p.argmax(-1)).double().sum()
    return torch.stack([kl, ce, same]).cpu()
