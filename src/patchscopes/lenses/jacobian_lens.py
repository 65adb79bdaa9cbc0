"""Jacobian lens: what a state at layer ℓ makes the model say, now or later, to first order and on average.

    lens_ℓ(h) = unembed(J_ℓ h),   J_ℓ = E_{prompts, t} Σ_{t′ ≥ t} ∂h_L[t′] / ∂h_ℓ[t],   0 < ℓ < L

Gurnee et al. 2026. J is the mean over prompts and valid positions t of the derivative of the last layer, *summed* over the valid
positions t′ from t on (not of position t alone, as one might think); valid are all but the first 16 and the last. Nothing is trained.
With J = I it is the logit lens. It is not reliably better than that one (independent replications on seven models), so compare them on
yours (`evaluate`).

The public file, a torch dict {"J": {block: [d, d]}, "n_prompts", "source_layers", "d_model"}, is read without unpickling anything but
tensors; its block b is our layer b + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, LayerError, RefusedError, VectorError
from patchscopes.core.finite import require_finite
from patchscopes.engine.run import Run
from patchscopes.lenses.public import read_tensors
from patchscopes.lenses.report import LensReport, Progress, made_from, measure, middle
from patchscopes.lenses.windows import Window, digest_of, own_windows, require_one_stream, windows
from patchscopes.maps import Affine, ByLayer, Identity, Map, load_map, provenance_of, save_map
from patchscopes.model.model import Model
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope

SKIP = 16  # first positions of a prompt, whose derivatives are unlike all others
LENGTH = 128  # tokens of a prompt
ALIKE = 0.2  # cosine above which a Jacobian is taken for a model's own; see `check`


@dataclass(frozen=True, eq=False)
class JacobianLens:
    """jacobian[ℓ] is J_ℓ; n_layers is L. provenance: model, prompts, how well two halves of them agree."""

    jacobian: Mapping[int, Float[Tensor, "d_model d_model"]]
    n_layers: int
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.jacobian or len({j.shape for j in self.jacobian.values()}) != 1:
            raise InputError("a Jacobian lens needs at least one layer, all of one width")
        for layer, j in self.jacobian.items():
            require_finite(j, f"the Jacobian of layer {layer}")

    @property
    def map(self) -> ByLayer:
        """f of a Patchscope that writes at layer L."""
        last = self.n_layers
        maps: dict[tuple[int, int], Map] = {
            (layer, last): Affine(j.float().cpu(), None, "jacobian-lens")
            for layer, j in sorted(self.jacobian.items())
            if layer < last
        }
        return ByLayer({**maps, (last, last): Identity()}, "jacobian-lens")

    def logits(self, model: Model, h: Float[Tensor, "*row d_model"], layer: int) -> Float[Tensor, "*row vocab"]:
        """What the lens says of states at `layer`."""
        self.require(model)
        return model.unembed(self.map.for_layers(layer, self.n_layers)(h))

    def scope(self, *, model: Model | None = None) -> Patchscope:
        """The lens as a Patchscope: ℓ* = L, f = the lens, one token."""
        return replace(logit_lens(map=self.map, model=model), name="jacobian-lens")

    def require(self, model: Model) -> None:
        """VectorError or LayerError if the model is of another width or depth."""
        width = next(iter(self.jacobian.values())).shape[-1]
        if width != model.d_model:
            raise VectorError(f"the Jacobian lens is {width} wide; {model.name} is {model.d_model} wide")
        if self.n_layers != model.n_layers or not all(0 <= layer <= self.n_layers for layer in self.jacobian):
            raise LayerError(
                f"the Jacobian lens has layers {sorted(self.jacobian)} of a model of {self.n_layers}; {model.name} has {model.n_layers}"
            )

    def check(self, model: Model, texts: Sequence[str] | None = None, *, directions: int = 4) -> dict[int, float]:
        """How alike J and the model's own derivatives are, by layer: the mean cosine of Jᵀu and what a few backward passes on texts (None:
        what the model says itself) give for random u, both without their part along u, which every residual stream has. RefusedError
        if it is below `ALIKE` over the middle layers: J then belongs to another model. A lens need not beat the logit lens, so that
        cannot tell."""
        self.require(model)
        some = own_windows(model) if texts is None else windows(model, texts, LENGTH)
        layers = [layer for layer in middle(model.n_layers) if layer in self.jacobian] or sorted(self.jacobian)[:1]
        generator = torch.Generator().manual_seed(0)
        u = torch.nn.functional.normalize(torch.randn(directions, model.d_model, generator=generator), dim=-1)
        skip = min(SKIP, max(0, max(map(len, some)) // 2))
        usable = [one for one in some if len(one) > skip + 2][:8]
        if not usable:
            raise InputError(f"none of {len(some)} prompts has more than {skip + 2} tokens; give longer texts")
        own = {layer: torch.zeros(directions, model.d_model) for layer in layers}
        for one in usable:
            for layer, pulled in _pulled(model, one, layers, u, skip).items():
                own[layer] += pulled
        found = {}
        for layer in layers:
            mine, theirs = (x - (x * u).sum(-1, keepdim=True) * u for x in (u @ self.jacobian[layer].float().cpu(), own[layer]))
            found[layer] = float(torch.cosine_similarity(mine, theirs, dim=-1).mean())
        if not sum(found.values()) / len(found) >= ALIKE:
            figures = ", ".join(f"layer {layer}: {value:.2f}" for layer, value in found.items())
            raise RefusedError(
                f"this Jacobian lens does not fit {model.name}: its cosine with the model's own derivatives is {figures}; expected "
                f"{ALIKE} and more. It was most likely made for another model. Pass check=False to use it all the same"
            )
        return found

    def evaluate(self, model: Model, texts: Sequence[str], *, progress: Progress = lambda done, of, what: None) -> LensReport:
        """KL, CE and top-1 of every layer that it has, beside the logit lens."""
        self.require(model)
        below = sorted(layer for layer in self.jacobian if layer < self.n_layers)
        return measure(model, self.map, windows(model, texts), below, progress=progress)

    def save(self, path: str | Path) -> None:
        """As safetensors with provenance; also a map for `maps.load_map` and experiment files."""
        save_map(path, self.map, self.provenance)


def compute_jacobian_lens(
    model: Model,
    texts: Sequence[str],
    layers: Sequence[int] | None = None,
    *,
    skip: int = SKIP,
    length: int = LENGTH,
    dims_at_once: int = 32,
    progress: Progress = lambda done, of, what: None,
) -> JacobianLens:
    """J of some layers (None: 1 to L − 1), from the first window of each text; d_model / dims_at_once passes there and back for each.

    `provenance["agreement"]` is, for each layer, the cosine between the means over two halves of the prompts: the refit floor, below which
    differences say nothing.
    """
    require_one_stream(model)
    layers = list(range(1, model.n_layers)) if layers is None else sorted(set(layers))
    if not layers or not all(0 <= layer < model.n_layers for layer in layers):
        raise LayerError(f"layers {layers} were asked for; expected some of 0 to {model.n_layers - 1}")
    some = [one for text in texts for one in windows(model, [text], length)[:1] if len(one) > skip + 1]
    if not some:
        raise InputError(
            f"none of {len(texts)} texts has more than {skip + 1} tokens, of which the first {skip} and the last do not count"
        )
    one = torch.eye(model.d_model)
    halves = [{layer: torch.zeros(model.d_model, model.d_model) for layer in layers} for _ in range(2)]
    for k, window in enumerate(some):
        for start in range(0, model.d_model, dims_at_once):
            rows = slice(start, min(start + dims_at_once, model.d_model))
            for layer, pulled in _pulled(model, window, layers, one[rows], skip).items():
                halves[k % 2][layer][rows] += pulled
        progress(k + 1, len(some), "derivatives")
    found = {layer: (halves[0][layer] + halves[1][layer]) / len(some) for layer in layers}
    agree = {
        str(layer): float(torch.cosine_similarity(halves[0][layer].flatten(), halves[1][layer].flatten(), dim=0))
        for layer in layers
    }
    provenance = {
        "method": "Jacobian lens",
        "model": model.provenance(),
        "n_prompts": len(some),
        "skip": skip,
        "length": length,
        "texts": digest_of(some),
        "agreement": agree if len(some) > 1 else None,
    }
    return JacobianLens(found, model.n_layers, provenance)


def _pulled(
    model: Model, window: Window, layers: Sequence[int], u: Float[Tensor, "direction d_model"], skip: int
) -> dict[int, Float[Tensor, "direction d_model"]]:
    """Jᵀu of one prompt, for each row of u: ∂ Σ_{t′} u · h_L[t′] / ∂h_ℓ[t], the mean over t; t and t′ valid. One pass for all rows and
    layers: the prompt is run once for each row."""
    valid, last = slice(skip, len(window) - 1), f"resid.{model.n_layers}"
    tokens = model.tokens(list(window))

    def along(run: Run) -> Tensor:
        return torch.einsum("rtd,rd->r", run[last][:, valid], u.to(run[last]))

    g = model.gradients([tokens] * len(u), along, wrt=[*(f"resid.{layer}" for layer in layers), last])
    return {layer: g[f"resid.{layer}"][:, valid].mean(1).float().cpu() for layer in layers}


def load_jacobian_lens(path: str | Path, model: Model | None = None, *, check: bool = True) -> JacobianLens:
    """A Jacobian lens from a file that `save` wrote, or from a public .pt file.

    model  the model that it is for: width, depth and derivatives are compared with it, and it is refused if they do not fit. check=False
           compares width and depth alone
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; expected a Jacobian lens (.safetensors, or the public .pt)")
    lens = _public(path) if path.suffix in (".pt", ".pth", ".bin") else _of_map(path, load_map(path), provenance_of(path))
    if model is not None:
        if "source_layers" in lens.provenance and lens.n_layers < model.n_layers:  # the public file does not say L
            lens = replace(lens, n_layers=model.n_layers)
        lens.require(model)
        if check and not made_from(model, lens.provenance):
            lens.check(model)
    return lens


def _of_map(path: Path, f: Map, provenance: Mapping[str, Any]) -> JacobianLens:
    below = {pair: one for pair, one in f.maps.items() if pair[0] != pair[1]} if isinstance(f, ByLayer) else {}
    into = {to for _, to in below}
    if len(into) != 1 or not all(isinstance(one, Affine) and one.bias is None for one in below.values()):
        raise InputError(
            f"{str(path)!r} holds the map {f.name!r}, which is no Jacobian lens: expected linear maps from some layers into L"
        )
    return JacobianLens({s: one.weight for (s, _), one in below.items() if isinstance(one, Affine)}, into.pop(), provenance)


def _public(path: Path) -> JacobianLens:
    found = read_tensors(path, "a Jacobian lens")
    try:
        blocks = {int(block): j.float() for block, j in found["J"].items()}
        d = int(found["d_model"])
        about = {"n_prompts": int(found["n_prompts"]), "source_layers": [int(b) for b in found["source_layers"]], "d_model": d}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"{str(path)!r} could not be read as a Jacobian lens: {e!r}") from None
    if not blocks or any(j.shape != (d, d) for j in blocks.values()):
        shapes = ", ".join(f"{block}: {tuple(j.shape)}" for block, j in list(blocks.items())[:6]) or "nothing"
        raise InputError(f"{str(path)!r} holds {shapes}; expected one ({d}, {d}) for each block")
    return JacobianLens({block + 1: j for block, j in blocks.items()}, max(blocks) + 2, {"format": "jacobian-lens", **about})
