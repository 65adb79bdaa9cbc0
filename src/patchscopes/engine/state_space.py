"""Sites inside a state-space mixer, h_t = exp(A Δ_t) h_{t−1} + Δ_t B_t x_t,  y_t = (C_t h_t + D x_t) · act(gate_t).

    delta   Δ, the result of the mixer's softplus, before models that bound it do so     [batch, pos, channel or head]
    B, C    the last two of three parts into which the mixer splits what it computes from its input: before any norm of theirs
            [batch, pos, group · state]
    gate    what the mixer's gated norm gets beside the scan's output (Mamba-2, delta nets), or else the second half of the input's
            projection (Mamba-1)                                                          [batch, pos, channel]

They are seen as the mixer's forward calls these functions. The state itself is read and written in the cache, between tokens
(`engine.run`): state.b at a position is what block b carries on from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchscopes.core.errors import SiteError
from patchscopes.core.sites import Site
from patchscopes.engine.hooks import Change, Handle, all_of, hooked, on_arguments, on_functions

if TYPE_CHECKING:
    from patchscopes.engine.engine import Engine

SOFTPLUS = {nn.functional.softplus}
SPLITS = {torch.split, torch.Tensor.split}
HALVES = {torch.chunk, torch.Tensor.chunk}


def at_state_space(engine: Engine, site: Site, change: Change) -> Handle:
    """A hook, not yet on, that passes gate, delta, B or C of a block's mixer through `change`. SiteError if it has none."""
    parts = engine.parts.blocks[site.index]
    if parts.attention is None or site.name not in parts.state_space:
        raise SiteError(f"site {site} is not on this model: block {site.index} has no state-space mixer in which it was seen")
    size: list[tuple[int, int]] = []
    note = on_arguments(engine.blocks[site.index], lambda args, _kw: size.append(engine.rows_and_columns(args[0])))
    form = form_of(engine, site)
    return all_of(note, seen(parts.attention, parts.gated_norm, site.name, lambda x: _by_position(change, x, *size[-1], *form)))


@torch.no_grad()
def form_of(engine: Engine, site: Site) -> tuple[tuple[int, int] | None, int]:
    """The axes of batch and position in what the mixer computes, None where they are one, and how many numbers a token has.
    Measured once, in passes of two sizes."""
    if site not in engine.forms:
        parts, shapes = engine.parts.blocks[site.index], []
        assert parts.attention is not None
        for rows, length in ((1, 2), (3, 5)):
            found: list[torch.Size] = []
            with hooked([seen(parts.attention, parts.gated_norm, site.name, lambda x, found=found: found.append(x.shape))]):
                engine.forward(torch.zeros(rows, length, dtype=torch.long, device=engine.device))
            shapes.append(found[0])
        pairs = list(zip(*shapes, strict=True)) if len(shapes[0]) == len(shapes[1]) else []
        axes = (pairs.index((1, 3)), pairs.index((2, 5))) if {(1, 3), (2, 5)} <= set(pairs) else None
        engine.forms[site] = axes, shapes[0].numel() // 2
    return engine.forms[site]


def sites_of(mixer: nn.Module, gated_norm: nn.Module | None, forward: Callable[[], Any]) -> frozenset[str]:
    """Which of the sites are seen while `forward` runs the model."""
    found: set[str] = set()

    def look(name: str) -> Callable[[Tensor], None]:
        return lambda _x: found.add(name)

    for name in ("delta", "B", "C", "gate"):  # one at a time: each wraps the mixer's forward
        with hooked([seen(mixer, gated_norm, name, look(name))]):
            forward()
    return frozenset(found) if "delta" in found else frozenset()


def seen(mixer: nn.Module, gated_norm: nn.Module | None, name: str, change: Change) -> Handle:
    """The hook of one site; `change` gets the value as the model has it."""
    if name == "gate" and gated_norm is not None:

        def second(args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if len(args) > 1:
                new = change(args[1])
                return None if new is None else ((args[0], new, *args[2:]), kwargs)
            new = change(kwargs["gate"]) if kwargs.get("gate") is not None else None
            return None if new is None else (args, {**kwargs, "gate": new})

        return on_arguments(gated_norm, second)
    done = [False]

    def call(function: Any, args: tuple, kwargs: dict) -> Any:
        out = function(*args, **kwargs)
        if done[0]:
            return out
        if name == "delta" and function in SOFTPLUS and not isinstance(args[0], nn.Parameter):
            return _changed(out, change, done)
        if name in ("B", "C") and function in SPLITS and len(out) == 3 and out[0].shape != out[1].shape == out[2].shape:
            k = 1 if name == "B" else 2
            return (*out[:k], _changed(out[k], change, done), *out[k + 1 :])
        if name == "gate" and function in HALVES and len(out) == 2 and out[0].shape == out[1].shape:
            return (out[0], _changed(out[1], change, done))
        return out

    return all_of(on_arguments(mixer, lambda _a, _k: done.__setitem__(0, False)), on_functions(mixer, call))


def _changed(x: Tensor, change: Change, done: list[bool]) -> Tensor:
    done[0] = True
    new = change(x)
    return x if new is None else new


def _by_position(change: Change, x: Tensor, rows: int, size: int, axes: tuple[int, int] | None, width: int) -> Tensor | None:
    """Pass x on as [batch, pos, width], however the mixer has it: [batch, channel, pos] (Mamba), [head, batch, pos, …] (Zamba)."""
    if axes is not None and x.ndim > max(axes) and (x.shape[axes[0]], x.shape[axes[1]]) == (rows, size):
        ordered = x.movedim(axes, (0, 1))
        new = change(ordered.flatten(2))
        return None if new is None else new.reshape(ordered.shape).movedim((0, 1), axes)
    flat = x.reshape(rows, size, width, -1)
    if not torch.equal(flat, flat[..., :1].expand_as(flat)):
        raise SiteError(f"a pass of {size} tokens computes {flat.shape[-1]} values for each that the prompt's pass computes")
    new = change(flat[..., 0])  # steps of one token repeat a head's number for its channels (Mamba-2)
    return None if new is None else new[..., None].expand_as(flat).reshape(x.shape)
