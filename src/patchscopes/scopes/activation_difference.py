"""Activation difference: what fine-tuning changed, or what sets one kind of prompt apart, as one direction a layer.

    v_ℓ = mean over prompts of h_ℓ(first) − mean over prompts of h_ℓ(second)

first and second are two models that read the same prompts (Minder et al. 2025, arXiv 2510.13900: fine-tuned and base, random text, the
first five positions, mid depth), or two sets of prompts read by one model. A prompt counts once: its positions are averaged. v is then
looked at through any scope or lens, with both signs; `difference_scope` is that of the paper: three token-identity prompts, gains swept;
`in_all` keeps the tokens that all its prompts bring forth.

Any two sets differ. Beside each v stand

    p_value       of ‖v‖ among those of shuffled labels (two sets of prompts) or of flipped signs (one set, two models), 1/(n + 1) at best
    split_half    cosine of the v of two halves of the prompts: near 0 where there is nothing but noise
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, VectorError
from patchscopes.maps import Scale
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.readings import Readings
from patchscopes.scopes.source import Source, look

EXAMPLES = (("man", "1135", "hello"), ("bear", "42", "blue"), ("921", "target", "anna"))  # of the published code
ALPHAS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
SHUFFLES = 999


@dataclass(frozen=True, eq=False)
class Difference:
    """vectors[ℓ]: v of layer ℓ, float32, on the CPU; p_value[ℓ], split_half[ℓ]: see above; n: prompts of each side."""

    model: Model
    site: str
    vectors: dict[int, Float[Tensor, " d_model"]]
    p_value: dict[int, float]
    split_half: dict[int, float]
    n: tuple[int, int]
    paired: bool

    def source(self, layer: int) -> Source:
        """v and −v of a layer, to be looked at."""
        if layer not in self.vectors:
            raise InputError(f"the difference has no layer {layer}; it has {', '.join(map(str, sorted(self.vectors)))}")
        v = self.vectors[layer].to(self.model.device, self.model.dtype)
        return Source.of_vectors(self.model, torch.stack([v, -v]), layer=layer, labels=["+", "-"], site=self.site)

    @property
    def table(self) -> pl.DataFrame:
        """A row a layer: `layer`, `norm`, `p_value`, `split_half`."""
        rows = [
            {"layer": k, "norm": float(v.norm()), "p_value": self.p_value[k], "split_half": self.split_half[k]}
            for k, v in self.vectors.items()
        ]
        return pl.DataFrame(rows)


def activation_difference(first: Source, second: Source, *, shuffles: int = SHUFFLES, seed: int = 0) -> Difference:
    """first − second at every layer that both read; the vectors belong to first's model. InputError if they cannot be compared."""
    if first.site != second.site or first.layers() != second.layers():
        raise InputError("the two sides must be read at one site and the same layers")
    if first.model.d_model != second.model.d_model:
        raise VectorError(
            f"the two sides are {first.model.d_model} and {second.model.d_model} wide; expected models of one width"
        )
    one, other = _means(first), _means(second)
    paired = first.model is not second.model and _texts(first) == _texts(second)
    n = (len(next(iter(one.values()))), len(next(iter(other.values()))))
    if min(n) < 2:
        raise InputError(f"{n[0]} and {n[1]} prompts were given; expected at least two on each side")
    found = Difference(first.model, first.site, {}, {}, {}, n, paired)
    for layer in one:
        generator = torch.Generator().manual_seed(seed)
        a, b = one[layer], other[layer]
        v = a.mean(0) - b.mean(0)
        found.vectors[layer] = v.float()
        found.p_value[layer] = _p_value(a, b, paired, shuffles, generator)
        found.split_half[layer] = _split_half(a, b, paired, generator)
    return found


def difference_scope(
    alphas: Sequence[int | float] = ALPHAS, examples: Sequence[Sequence[str]] = EXAMPLES, *, max_new_tokens: int = 1
) -> Patchscope:
    """Token-identity prompts, written at the same layer in place of "?", at every gain."""
    if not alphas:
        raise InputError("alphas is empty; expected at least one")
    prompts = ["".join(f"{one} -> {one}\n" for one in some) + "?" for some in examples]
    maps = [Scale(float(alpha)) for alpha in alphas]
    return Patchscope(prompts, position=-1, map=maps, max_new_tokens=max_new_tokens, name="activation-difference")


def in_all(readings: Readings, model: Model, k: int = 10) -> pl.DataFrame:
    """Tokens among the k likeliest next ones of *every* target prompt: a row for each vector, layer, map, control and token, with `p`, the
    mean over prompts, the likeliest first. The readings must keep their logits. `control` says what another vector, a random one or
    another source's, brings forth so: the same one in all prompts."""
    if readings.logits is None:
        raise InputError("these readings have no logits; call the scope with keep_logits=True")
    keys = ["prompt", "prompt_text", "position", "source_layer", "target_layer", "map", "control"]
    top = readings.logits.float().softmax(-1).topk(min(k, readings.logits.shape[-1]))
    table = readings.table.select(*keys, "target").with_columns(
        token_id=pl.Series(top.indices.tolist()), p=pl.Series(top.values.double().tolist())
    )
    targets = table["target"].n_unique()
    every = table.explode("token_id", "p").group_by(*keys, "token_id", maintain_order=True)
    found = every.agg(pl.col("p").mean(), pl.col("target").n_unique().alias("targets")).filter(pl.col("targets") == targets)
    names = pl.Series("token", [model.show(one) for one in found["token_id"]], dtype=pl.String)
    return found.drop("targets").with_columns(names).sort(*keys, "p", descending=[False] * len(keys) + [True])


def _means(source: Source) -> dict[int, Float[Tensor, "prompt d_model"]]:
    """Of each prompt the mean of its positions, at every layer, in float64 on the CPU."""
    places, layers = source.places(), source.layers()
    looked = look(source.model, places, layers, source.site)
    prompts = [place.prompt for place in places]
    count = torch.bincount(torch.tensor(prompts)).double()
    found = {}
    for layer in layers:
        states = torch.stack([looked.vectors[k, layer][-1] for k in range(len(places))]).double().cpu()
        if states.ndim > 2:
            raise VectorError(f"{source.model.name} carries several residual streams; a difference is of single ones")
        found[layer] = torch.zeros(len(count), states.shape[-1], dtype=torch.float64).index_add_(0, torch.tensor(prompts), states)
        found[layer] /= count[:, None]
    return found


def _texts(source: Source) -> list[tuple[int, str]]:
    return [(place.prompt, place.text) for place in source.places()]


def _p_value(a: Tensor, b: Tensor, paired: bool, shuffles: int, generator: torch.Generator) -> float:
    """(1 + number of shuffles at least as long) / (shuffles + 1)."""
    if paired:
        signs = torch.randint(0, 2, (shuffles, len(a)), generator=generator).double() * 2 - 1
        own, null = (a - b).mean(0).norm(), (signs @ (a - b) / len(a)).norm(dim=-1)
    else:
        both = torch.cat([a, b])
        weights = torch.zeros(shuffles, len(both), dtype=torch.float64)
        for row in weights:
            order = torch.randperm(len(both), generator=generator)
            row[order[: len(a)]], row[order[len(a) :]] = 1 / len(a), -1 / len(b)
        own, null = (a.mean(0) - b.mean(0)).norm(), (weights @ both).norm(dim=-1)
    return (1 + int((null >= own * (1 - 1e-12)).sum())) / (shuffles + 1)


def _split_half(a: Tensor, b: Tensor, paired: bool, generator: torch.Generator) -> float:
    """Cosine of the differences of two halves, drawn at random."""
    order = torch.randperm(len(a), generator=generator)
    same = order if paired else torch.randperm(len(b), generator=generator)
    halves = [
        a[order[some(len(a))]].mean(0) - b[same[some(len(b))]].mean(0)
        for some in (lambda n: slice(0, n // 2), lambda n: slice(n // 2, n))
    ]
    return float(torch.nn.functional.cosine_similarity(*halves, dim=0))
