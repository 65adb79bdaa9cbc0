"""Maps on disk: their tensors in a safetensors file; kind, name, numbers and where the map comes from as JSON in its metadata.

The map of one pair of layers in a layered one has its tensors under "ℓ.ℓ*.": "2.6.weight".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from patchscopes.core.errors import InputError, PatchscopesError
from patchscopes.core.files import write_whole
from patchscopes.core.tensor_files import read_tensor_file
from patchscopes.maps.affine import Affine
from patchscopes.maps.by_layer import ByLayer
from patchscopes.maps.identity import Identity
from patchscopes.maps.low_rank import LowRank
from patchscopes.maps.map import Map
from patchscopes.maps.mean import Mean
from patchscopes.maps.noise import Noise
from patchscopes.maps.norm_match import NormMatch
from patchscopes.maps.per_direction import PerDirection
from patchscopes.maps.scale import Scale
from patchscopes.maps.zero import Zero

FORMAT = 1
# kind -> the class, its tensors (those in brackets may be missing), and the numbers beside them
KINDS: dict[str, tuple[type, tuple[str, ...], tuple[str, ...]]] = {
    "identity": (Identity, (), ("name",)),
    "scale": (Scale, (), ("alpha",)),
    "zero": (Zero, (), ("width",)),
    "noise": (Noise, (), ("sigma", "seed")),
    "mean": (Mean, ("mean",), ("name",)),
    "norm_match": (NormMatch, ("length",), ("name",)),
    "affine": (Affine, ("weight", "[bias]"), ("name",)),
    "low_rank": (LowRank, ("up", "down", "[bias]"), ("skip", "name")),
    "per_direction": (PerDirection, ("gains", "[directions]", "[bias]"), ("name",)),
}
_AXES = {"weight": 2, "up": 2, "down": 2, "directions": 2, "length": None}  # of tensors that are no vectors; None: any number


def save_map(path: str | Path, map: Map, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a map of this package. provenance: how it was made, as JSON can hold it. InputError for a map of another class."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"format": FORMAT, **_described(map, "", tensors), "provenance": dict(provenance or {})}
    write_whole(Path(path), save(tensors, {"map": json.dumps(about)}))


def load_map(path: str | Path) -> Map:
    """The map of a file that `save_map` wrote. InputError if it is none; VectorError if a number in it is not finite."""
    about, tensors = _read(path)
    try:
        return _made(path, about, "", tensors)
    except (TypeError, KeyError, AttributeError) as e:  # what metadata of the wrong shape leads to
        if isinstance(e, PatchscopesError):
            raise
        raise InputError(f"{str(path)!r} could not be read as a map: its metadata lacks something ({e})") from None


def provenance_of(path: str | Path) -> dict[str, Any]:
    """How the map of a file was made, as it was saved with it."""
    return dict(_read(path)[0].get("provenance", {}))


def _described(map: Map, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if type(map) is ByLayer:
        pairs = sorted(map.maps)
        return {
            "kind": "by_layer",
            "name": map.name,
            "maps": [{"layers": [s, t], **_described(map.maps[s, t], f"{prefix}{s}.{t}.", tensors)} for s, t in pairs],
        }
    kind = next((kind for kind, (cls, _, _) in KINDS.items() if type(map) is cls), None)
    if kind is None:
        raise InputError(
            f"the map {map.name!r} is a {type(map).__name__}, which cannot be written down; expected one of {', '.join(KINDS)}"
        )
    for name in KINDS[kind][1]:
        tensor = getattr(map, name.strip("[]"))
        if tensor is not None:
            tensors[prefix + name.strip("[]")] = tensor.detach().cpu().clone().contiguous()
    found = {"kind": kind, **{name: getattr(map, name) for name in KINDS[kind][2]}}
    if isinstance(map, NormMatch) and map.before is not None:
        found["before"] = _described(map.before, f"{prefix}before.", tensors)
    return found


def _made(path: str | Path, about: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Map:
    kind = about.get("kind", "affine")
    if kind == "by_layer":
        made = {
            (int(s), int(t)): _made(path, one, f"{prefix}{s}.{t}.", tensors) for one in about["maps"] for s, t in [one["layers"]]
        }
        return ByLayer(made, str(about["name"]))
    if kind not in KINDS:
        raise InputError(f"{str(path)!r} holds a map of kind {kind!r}; this version reads {', '.join((*KINDS, 'by_layer'))}")
    cls, wanted, numbers = KINDS[kind]
    given: dict[str, Any] = {name: about[name] for name in numbers if name in about}
    given |= {name: t for one in wanted if (t := tensors.get(prefix + (name := one.strip("[]")))) is not None}
    missing = [name for name in wanted if not name.startswith("[") and name not in given]
    rank = {name: _AXES.get(name.strip("[]"), 1) for name in wanted}
    odd = [n for one, axes in rank.items() if (n := one.strip("[]")) in given and axes is not None and given[n].ndim != axes]
    bias = given.get("bias")
    makes = next(
        (
            given[name].shape[0 if name != "directions" else 1]
            for name in ("weight", "up", "directions", "gains")
            if name in given
        ),
        None,
    )
    if missing or odd or (bias is not None and bias.shape != (makes,)):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items() if name.startswith(prefix)) or "nothing"
        expected = "weight (d_target, d_source) and, if there is one, bias (d_target)" if kind == "affine" else ", ".join(wanted)
        raise InputError(f"{str(path)!r} holds {shapes}; expected {expected}")
    if "before" in about:
        given["before"] = _made(path, about["before"], f"{prefix}before.", tensors)
    return cls(**given)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if not Path(path).is_file():
        raise InputError(f"there is no map {str(path)!r}; expected a safetensors file that save_map wrote")
    about, tensors = read_tensor_file(Path(path), "map", "a map")
    if about.get("format", FORMAT) != FORMAT:
        raise InputError(f"{str(path)!r} holds a map of format {about['format']!r}; this version reads format {FORMAT}")
    return about, tensors
