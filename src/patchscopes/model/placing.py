"""Edits as the engine takes them: for each prompt and site, with positions resolved and values that fit, or refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchscopes.core.coordinates import Dictionary, Subspace, Whole
from patchscopes.core.edits import Edit
from patchscopes.core.errors import InputError, PositionError, VectorError
from patchscopes.core.finite import require_finite
from patchscopes.core.positions import Positions, Span
from patchscopes.core.sites import EDGES, Site, resolve_sites
from patchscopes.engine.edits import Placed
from patchscopes.engine.engine import Engine
from patchscopes.engine.places import dtype_of, shape_of
from patchscopes.model.tokens import Tokens


def placed(engine: Engine, dtype: torch.dtype, name: str, edits: Sequence[Edit], batch: Sequence[Tokens]) -> list[Placed]:
    """`edits` of the prompts `batch`, for a model called `name` that computes in `dtype`."""
    if isinstance(edits, Edit) or not all(isinstance(edit, Edit) for edit in edits):
        raise InputError("edits is a list of Edit; knock_out and freeze give lists themselves: edits=[one, *knock_out(…)]")
    return [
        Placed(
            site,
            p,
            _positions(edit.position, batch[p]),
            _value(engine, dtype, name, edit, site, batch[p]),
            edit.write,
            edit.amount,
            _positions(edit.keys, batch[p]),
            edit.steps,
            edit.coordinates,
            edit.features,
        )
        for edit in edits
        for site in resolve_sites(edit.site, engine.n_layers)
        for p in _prompts_of(edit, batch)
    ]


def _value(engine: Engine, dtype: torch.dtype, name: str, edit: Edit, site: Site, tokens: Tokens) -> Tensor | None:
    """The edit's value, if it can be written there."""
    shape = shape_of(engine, site)
    value = edit.value
    if site.name not in (*EDGES, "state"):
        _check_features(edit, site, shape[-1])
    if value is None:
        return None
    fits = value.dtype == dtype or (value.is_floating_point() and value.dtype == dtype_of(engine, site))
    if not fits or value.device not in engine.devices:
        raise VectorError(
            f"the edit at {site} has a value in {_kind(value.dtype, value.device)}, but {name} computes in "
            f"{_kind(dtype, engine.device)}. Convert it: value.to(model.device, model.dtype)"
        )
    minus_infinity = site.name == "scores"  # which the mask leaves there: what was read may be written
    require_finite(value.nan_to_num(neginf=0.0, nan=torch.nan) if minus_infinity else value, f"the edit at {site}")
    if edit.coordinates is not None or edit.features is not None or site.name == "state":
        return value
    if site.name in EDGES:
        n = [len(p) if (p := _positions(where, tokens)) is not None else len(tokens) for where in (edit.position, edit.keys)]
        expected = tuple(n) if site.head is not None else (*shape[:-2], *n)
    else:
        n_positions = len(p) if (p := _positions(edit.position, tokens)) is not None else len(tokens)
        expected = (n_positions, *shape)
    streams = engine.streams if site.name == "resid" else ()
    each = (expected[0], *streams, *shape) if streams else ()
    if streams and value.shape == (*streams, *shape) == expected and expected[0] > 1:
        raise VectorError(
            f"the edit at {site} has a value of shape {tuple(value.shape)}, one for each stream or one for each position; "
            f"give it as (1, {', '.join(map(str, value.shape))}) or as {each}"
        )
    if not _broadcasts(value.shape, expected) and not (
        streams and value.ndim >= 1 + len(shape) and _broadcasts(value.shape, each)
    ):
        raise VectorError(
            f"the edit at {site} has a value of shape {tuple(value.shape)}; expected {shape} for all its positions, or {expected}"
            if site.name not in EDGES
            else f"the edit at {site} has a value of shape {tuple(value.shape)}; expected {expected} (…, query, key)"
        )
    return value


def _prompts_of(edit: Edit, batch: Sequence[Tokens]) -> Sequence[int]:
    if edit.prompt is None:
        return range(len(batch))
    if not -len(batch) <= edit.prompt < len(batch):
        raise PositionError(f"the edit names prompt {edit.prompt}, but there are {len(batch)} (counted from 0)")
    return [edit.prompt % len(batch)]


def _positions(where: Positions, tokens: Tokens) -> tuple[int, ...] | None:
    """From 0, each once (two names may mean one token: it is written once)."""
    if where is None:
        return None
    asked = [where] if isinstance(where, (int, str, Span)) else list(where)
    return tuple(dict.fromkeys(tokens.position(position) for position in asked))


def _check_features(edit: Edit, site: Site, width: int) -> None:
    """VectorError if coordinates, features or a value in them do not fit a site of this width. Of classes of one's own nothing is known."""
    system = edit.coordinates
    directions = {Subspace: "basis", Dictionary: "encoder"}.get(type(system))  # type: ignore[arg-type]
    count = width
    if directions is not None:
        count, reads = getattr(system, directions).shape
        if reads != width:
            raise VectorError(
                f"the coordinates of the edit at {site} are of values {reads} wide; what stands there is {width} wide"
            )
    elif system is not None and type(system) is not Whole:
        return
    wrong = [f for f in edit.features or () if not 0 <= f < count]
    if wrong:
        raise VectorError(f"the edit at {site} names feature {wrong[0]}; there are {count}, counted from 0")
    allowed = [count] if edit.features is None else [len(edit.features), count]
    given = allowed[0] if edit.value is None else edit.value.shape[-1] if edit.value.ndim else 0
    if (system is not None or edit.features is not None) and given not in allowed:
        raise VectorError(f"the edit at {site} has a value for {given} features; expected {' or '.join(map(str, allowed))}")


def _kind(dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} on {device}"


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))
