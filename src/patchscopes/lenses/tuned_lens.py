"""Tuned lens: what the model would say next from layer ℓ, after a learned change of basis.

    lens_ℓ(h) = unembed(h + W_ℓ h + b_ℓ),   0 ≤ ℓ < L

unembed is the model's own final norm, head, scale and soft-cap. W and b start at zero, so that an untrained tuned lens is the logit lens,
and weight decay pulls towards it; they are trained so that the lens says what the model says in the end (`training`). Belrose et al.
2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens". A lens is a map into layer L, so `lens.scope()` is a
Patchscope.

The public folder (config.json, params.pt with "i.weight" and "i.bias", i the input of block i) is read too. Its `unembed_hash` is of a
printed summary of the head and misses most changes, so a lens is compared with a model by what it says instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, LayerError, VectorError
from patchscopes.core.finite import require_finite
from patchscopes.lenses.public import read_tensors
from patchscopes.lenses.report import LensReport, Progress, made_from, measure, require_closer
from patchscopes.lenses.windows import own_windows, windows
from patchscopes.maps import Affine, ByLayer, Identity, Map, load_map, provenance_of, save_map
from patchscopes.model.model import Model
from patchscopes.organisms import bundled_lenses
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope


@dataclass(frozen=True, eq=False)
class TunedLens:
    """weight[ℓ] is W_ℓ, bias[ℓ] is b_ℓ. provenance: model, texts, training."""

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require_finite(self.weight, "the weight of the tuned lens")
        require_finite(self.bias, "the bias of the tuned lens")

    @classmethod
    def untrained(cls, model: Model) -> TunedLens:
        """W = 0, b = 0: the logit lens."""
        n, d = model.n_layers, model.d_model
        return cls(torch.zeros(n, d, d), torch.zeros(n, d))

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.weight)

    @property
    def map(self) -> ByLayer:
        """f of a Patchscope that writes at layer L: I + W_ℓ and b_ℓ from every ℓ < L, nothing at L itself."""
        one = torch.eye(self.weight.shape[-1])
        last = self.n_layers
        maps: dict[tuple[int, int], Map] = {
            (layer, last): Affine(one + self.weight[layer].float().cpu(), self.bias[layer].float().cpu(), "tuned-lens")
            for layer in range(last)
        }
        return ByLayer({**maps, (last, last): Identity()}, "tuned-lens")

    def logits(self, model: Model, h: Float[Tensor, "*row d_model"], layer: int) -> Float[Tensor, "*row vocab"]:
        """What the lens says of states at `layer`."""
        self.require(model)
        if not 0 <= layer <= self.n_layers:
            raise LayerError(f"layer {layer} is not in this lens; it has layers 0 to {self.n_layers}")
        return model.unembed(self.map.for_layers(layer, self.n_layers)(h))

    def scope(self, *, model: Model | None = None) -> Patchscope:
        """The lens as a Patchscope: ℓ* = L, f = the lens, one token."""
        return replace(logit_lens(map=self.map, model=model), name="tuned-lens")

    def require(self, model: Model) -> None:
        """VectorError or LayerError if the model is of another width or depth."""
        if self.weight.shape[-1] != model.d_model:
            raise VectorError(f"the tuned lens is {self.weight.shape[-1]} wide; {model.name} is {model.d_model} wide")
        if self.n_layers != model.n_layers:
            raise LayerError(f"the tuned lens has {self.n_layers} layers below the last; {model.name} has {model.n_layers}")

    def check(self, model: Model, texts: Sequence[str] | None = None) -> LensReport:
        """Compare with a model by what both say, on texts or (None) on what the model says itself. RefusedError, with the figures, if
        the lens is further from the model than the logit lens; VectorError or LayerError if it cannot be applied at all."""
        self.require(model)
        some = own_windows(model) if texts is None else windows(model, texts)
        return require_closer(model, self.map, some, "this tuned lens")

    def evaluate(self, model: Model, texts: Sequence[str], *, progress: Progress = lambda done, of, what: None) -> LensReport:
        """KL, CE and top-1 of every layer on texts that it was not trained on, beside the logit lens."""
        self.require(model)
        return measure(model, self.map, windows(model, texts), progress=progress)

    def save(self, path: str | Path) -> None:
        """As safetensors with provenance; also a map for `maps.load_map` and experiment files."""
        save_map(path, self.map, self.provenance)


def load_tuned_lens(path: str | Path, model: Model | None = None, *, check: bool = True) -> TunedLens:
    """A tuned lens from a file that `save` wrote, a folder that training left, or a folder in the public format; or that of a bundled
    model ("atlas").

    model  the model that it is for: width, depth and what it says are compared with it, and it is refused if they do not fit. check=False
           compares width and depth alone
    """
    path = Path(path)
    path = path if path.exists() else bundled_lenses().get(str(path), path)
    own = path / "tuned_lens.safetensors" if path.is_dir() else path
    public = path.is_dir() and not own.exists()
    lens = _public(path) if public else _of_map(own, load_map(own), provenance_of(own))
    if model is not None:
        lens.require(model)
        if check and not made_from(model, lens.provenance):
            lens.check(model)
    return lens


def _of_map(path: Path, f: Map, provenance: Mapping[str, Any]) -> TunedLens:
    below = {pair: one for pair, one in f.maps.items() if pair[0] != pair[1]} if isinstance(f, ByLayer) else {}
    n = len(below)
    fits = set(below) == {(layer, n) for layer in range(n)} and all(
        isinstance(one, Affine) and one.bias is not None for one in below.values()
    )
    if not n or not fits:
        raise InputError(
            f"{str(path)!r} holds the map {f.name!r}, which is no tuned lens: expected an affine map from each layer below L into L"
        )
    some = [one for layer in range(n) if isinstance(one := below[layer, n], Affine) and one.bias is not None]
    one = torch.eye(some[0].weight.shape[1])
    if any(f.weight.shape != one.shape for f in some):
        raise InputError(f"{str(path)!r} holds maps of different widths; expected all of one, from a model into itself")
    return TunedLens(
        torch.stack([f.weight - one for f in some]), torch.stack([f.bias for f in some if f.bias is not None]), provenance
    )


def _public(folder: Path) -> TunedLens:
    """config.json and params.pt of AlignmentResearch/tuned-lens. The file is unpickled with tensors only (weights_only)."""
    config_file, params_file = folder / "config.json", folder / "params.pt"
    if not (config_file.is_file() and params_file.is_file()):
        raise InputError(
            f"{str(folder)!r} holds no tuned lens: expected config.json and params.pt (the public format), or tuned_lens.safetensors"
        )
    params = read_tensors(params_file, "a tuned lens")
    try:
        config = json.loads(config_file.read_text())
        n, d = int(config["num_hidden_layers"]), int(config["d_model"])
    except (KeyError, TypeError, ValueError) as e:  # ValueError: no JSON, too
        raise InputError(f"{str(config_file)!r} could not be read as that of a tuned lens: {e!r}") from None
    if config.get("lens_type", "linear_tuned_lens") != "linear_tuned_lens":
        raise InputError(f"{str(folder)!r} holds a lens of type {config['lens_type']!r}; expected 'linear_tuned_lens'")
    weight, bias = [], []
    for layer in range(n):
        w, b = params.get(f"{layer}.weight"), params.get(f"{layer}.bias")
        b = torch.zeros(d) if b is None and not config.get("bias", True) else b
        if w is None or b is None or w.shape != (d, d) or b.shape != (d,):
            there = ", ".join(f"{name} {tuple(t.shape)}" for name, t in list(params.items())[:6])
            raise InputError(
                f"{str(params_file)!r} has no '{layer}.weight' ({d}, {d}) and '{layer}.bias' ({d},); it has {there}, …"
            )
        weight.append(w.float())
        bias.append(b.float())
    return TunedLens(torch.stack(weight), torch.stack(bias), {"format": "tuned-lens", "config": config})
