"""Maps on disk: weight and bias in a safetensors file, and name, kind and where the map comes from as JSON in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from patchscopes.core.errors import InputError
from patchscopes.maps.affine import Affine

FORMAT = 1


def save_map(path: str | Path, map: Affine, provenance: Mapping[str, Any] | None = None) -> None:
    """Write an affine map. provenance: how it was made, as JSON can hold it."""
    about = {"format": FORMAT, "kind": "affine", "name": map.name, "provenance": dict(provenance or {})}
    save_file(_tensors(map), path, {"map": json.dumps(about)})


def load_map(path: str | Path) -> Affine:
    """The map of a file that `save_map` wrote. InputError if it is none; VectorError if a number in it is not finite."""
    if not Path(path).is_file():
        raise InputError(f"there is no map {str(path)!r}; expected a safetensors file that save_map wrote")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("map", "{}"))
            # copies, because where a tensor lies in memory can change the last bits of what is computed with it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, json.JSONDecodeError) as e:
        raise InputError(f"{str(path)!r} could not be read as a map: {e}") from None
    if about.get("format", FORMAT) != FORMAT or about.get("kind", "affine") != "affine":
        found = f"kind {about.get('kind')!r}, format {about.get('format')!r}"
        raise InputError(f"{str(path)!r} holds a map of {found}; this version reads 'affine' of format {FORMAT}")
    weight, bias = tensors.get("weight"), tensors.get("bias")
    fits = weight is not None and weight.ndim == 2 and (bias is None or bias.shape == weight.shape[:1])
    if weight is None or not fits:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise InputError(
            f"{str(path)!r} holds {shapes}; expected weight (d_target, d_source) and, if there is one, bias (d_target)"
        )
    return Affine(weight, bias, name=str(about.get("name", "affine")))


def _tensors(map: Affine) -> dict[str, torch.Tensor]:
    both = {"weight": map.weight, "bias": map.bias}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in both.items() if tensor is not None}
