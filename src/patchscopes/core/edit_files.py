"""Edits on disk: tensors in a safetensors file, and everything else as JSON in its metadata. `Edit.digest` hashes the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from patchscopes.core.coordinates import Coordinates, Dictionary, Subspace, Whole
from patchscopes.core.edits import Edit
from patchscopes.core.errors import InputError, RefusedError
from patchscopes.core.positions import Span

_SAVED = {kind.__name__: kind for kind in (Whole, Subspace, Dictionary)}


def save_edits(path: str, edits: Sequence[Edit]) -> None:
    """Write edits to a safetensors file. RefusedError for coordinates of a class of your own."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    saved = [described(edit, str(k), tensors, to_save=True) for k, edit in enumerate(edits)]
    save_file(
        {k: t.clone().contiguous() for k, t in tensors.items()}  # edits may share a value, tensors of a file may not
        or {"none": torch.zeros(0)},
        path,
        {"edits": json.dumps(saved)},
    )


def load_edits(path: str) -> list[Edit]:
    """The edits of a file that `save_edits` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get("edits")
        if found is None:
            raise InputError(f"{path} holds no edits; expected a file that save_edits wrote")
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict; clones are aligned)
    return [_made(description, str(k), tensors) for k, description in enumerate(json.loads(found))]


def described(edit: Edit, key: str, tensors: dict[str, Tensor], *, to_save: bool = False) -> dict[str, Any]:
    """Everything but the tensors, which go into `tensors` under names that begin with `key`."""
    plain: dict[str, Any] = {}
    for field in fields(edit):
        value = getattr(edit, field.name)
        if isinstance(value, Tensor):
            tensors[f"{key}.{field.name}"] = value.detach().cpu()
        elif field.name == "coordinates" and value is not None:
            kind = type(value).__name__
            if to_save and type(value) is not _SAVED.get(kind):
                raise RefusedError(f"coordinates of the class {kind} cannot be saved; {', '.join(_SAVED)} can")
            parts = {name: getattr(value, name) for name in getattr(value, "__dataclass_fields__", {"name": None})}
            for name, part in parts.items():
                if isinstance(part, Tensor):
                    tensors[f"{key}.coordinates.{name}"] = part.detach().cpu()
            plain["coordinates"] = {"kind": kind, **{n: p for n, p in parts.items() if not isinstance(p, Tensor)}}
        elif value != field.default:
            plain[field.name] = float(edit.amount) if field.name == "amount" else _listed(value)
    return plain


def _listed(value: object) -> Any:
    if isinstance(value, Span):
        return {"span": asdict(value)}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple, range)) else value


def _unlisted(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return Span(**value["span"])
    if isinstance(value, list):
        return (list if name in ("position", "keys") else tuple)(_unlisted(name, v) for v in value)
    return value


def _made(plain: dict[str, Any], key: str, tensors: dict[str, Tensor]) -> Edit:
    system: dict[str, Any] | None = plain.pop("coordinates", None)
    coordinates: Coordinates | None = None
    if system is not None:
        start = f"{key}.coordinates."
        parts: dict[str, Any] = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        coordinates = _SAVED[system.pop("kind")](**system, **parts)
    rest = {name: _unlisted(name, value) for name, value in plain.items()}
    return Edit(**rest, value=tensors.get(f"{key}.value"), coordinates=coordinates)
