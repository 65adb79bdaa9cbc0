"""Where each site is in a running model: hooks that pass the value of a site, in the shape that `core.sites` gives it, through a change.

What is no module's input or output is computed from what is:

    head_out    Σ_h W_O z_h: each head's z alone through the model's own output map, its bias taken off, then through the norm that
                some models put behind it, at the scale of this run; a change is added to what the attention adds
    expert_out  every expert on the block's input, by the model's own experts with the routing forced; a change is added with the
                weight that the router gave
    *_scale     s of the norm, out = w (x − mean) / s + c; a change puts another s in its place
    router      the first product inside the router that has one column an expert
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchscopes.core.errors import SiteError
from patchscopes.core.sites import EDGES, STATE_SPACE, Site
from patchscopes.engine.attention import SLOT, switched
from patchscopes.engine.classic import at_products
from patchscopes.engine.engine import Engine
from patchscopes.engine.hooks import (
    Change,
    Handle,
    all_of,
    first_input,
    first_tensor,
    hooked,
    of_context,
    on_arguments,
    on_functions,
    on_output,
    on_read,
)
from patchscopes.engine.parts import Norm, Parts
from patchscopes.engine.state_space import at_state_space

ATTENDED = ("q", "k", "v", "z", *EDGES)
BEFORE_THE_REST = ("head_out", "final_scale")  # changes of a module's output that `attn_out` and `final_norm` are to see


class Current:
    """Which block runs now: some models run one module in several blocks (Zamba-2)."""

    block: int = -1

    def guard(self, block: int, change: Change) -> Change:
        """`change`, in `block` only."""
        return lambda x: change(x) if self.block == block else None


def at_sites(engine: Engine, changes: Mapping[Site, Change], current: Current | None = None) -> list[Handle]:
    """Hooks, not yet on, that pass every site of `changes` (whole sites, without heads) through its change.

    SiteError, before anything runs, for a site that the model has not.
    """
    current = current or Current()
    handles: list[Handle] = []
    inner = [
        site
        for site in changes
        if site.name not in ("resid", "attn_out", "mlp_out", "embed", "final_norm", "final_scale", "logits")
    ]
    if inner:

        def enter(b: int) -> Handle:
            return on_arguments(engine.blocks[b], lambda _args, _kwargs: setattr(current, "block", b))

        handles += [enter(b) for b in range(engine.n_layers)]
    taps: dict[nn.Module, _Tap] = {}
    for site in sorted(changes, key=lambda site: site.name not in BEFORE_THE_REST):
        change = changes[site]
        if site.name in ("resid", "attn_out", "mlp_out"):
            handles.append(engine.at_site(site, change))
        elif site.name in ("embed", "final_norm", "final_scale", "logits"):
            handles.append(_of_the_model(engine, site, change))
        elif site.name in ATTENDED and (attention := engine.parts.blocks[site.index]).heads:
            if attention.twice and site.name in ("v", "z"):
                raise SiteError(
                    f"site {site} is not on this model: {type(attention.attention).__name__} of block {site.index} attends more than "
                    "once in a pass, to other values each time"
                )
            assert attention.attention is not None
            taps.setdefault(attention.attention, _Tap(current, site.index)).changes[site.index, site.name] = change
        else:
            handles.append(_in_block(engine, site, change, current))
    if taps:
        handles.append(of_context(lambda: switched(engine.model)))
        handles += [_tapping(module, tap, engine.parts.blocks[tap.block].attends) for module, tap in taps.items()]
    return handles


def shape_of(engine: Engine, site: Site) -> tuple[int, ...]:
    """The axes of a site's value behind [batch, pos]; of edges [head, query, key], for two tokens. Measured once.

    SiteError if the model has not got the site, or the head. Streams in front of the batch (Gemma-3n) are left out: one vector
    does for all of them. A state is known to the cache alone: ().
    """
    whole = site.whole
    if whole not in engine.shapes:
        engine.shapes[whole] = _measured_shape(engine, whole)
    shape = engine.shapes[whole]
    if site.head is None:
        return shape
    if site.head >= shape[0]:
        raise SiteError(f"site {site} is not on this model: {whole} has {shape[0]} heads, counted from 0")
    return shape[1:]


@torch.no_grad()
def dtype_of(engine: Engine, site: Site) -> torch.dtype | None:
    """The number format of what stands at a site, which need not be that of the weights (float32 in a bfloat16 model's residual
    stream, router or norm). Measured once; None for a state, which the cache keeps."""
    whole = site.whole
    if whole not in engine.dtypes and whole.name != "state":

        def note(x: Tensor) -> None:
            engine.dtypes[whole] = x.dtype

        with hooked(at_sites(engine, {whole: note})):
            engine.forward(torch.zeros(1, 2, dtype=torch.long, device=engine.device))
    return engine.dtypes.get(whole)


@torch.no_grad()
def _measured_shape(engine: Engine, site: Site) -> tuple[int, ...]:
    if site.name in ("attn_out", "mlp_out"):
        engine.writer(site)
    if site.name in ("resid", "attn_out", "mlp_out"):
        return (engine.d_model,)
    if site.name == "state":
        return ()
    found: list[torch.Size] = []

    def note(x: Tensor) -> None:
        found.append(x.shape)
        engine.dtypes[site] = x.dtype

    with hooked(at_sites(engine, {site: note})):
        engine.forward(torch.zeros(1, 2, dtype=torch.long, device=engine.device))
    if not found:
        raise SiteError(f"site {site} is not on this model: nothing passed there")
    return tuple(found[0][-3:] if site.name in EDGES else found[0][-site.features :])


# ---------------------------------------------------------------------------------------------------------------------- attention


class _Tap:
    """Changes of the sites inside one attention module."""

    def __init__(self, current: Current, block: int):
        self.current, self.block = current, block
        self.changes: dict[tuple[int, str], Change] = {}

    def heads(self, name: str, value: Tensor) -> Tensor:
        change = self.changes.get((self.current.block, name))
        new = None if change is None else change(value.transpose(1, 2))
        return value if new is None else new.transpose(1, 2)

    def edges(self, name: str, value: Tensor) -> Tensor:
        change = self.changes.get((self.current.block, name))
        new = None if change is None else change(value)
        return value if new is None else new


def _tapping(module: nn.Module, tap: _Tap, attends: bool) -> Handle:
    if not attends:
        return at_products(module, tap)

    @contextmanager
    def tapped() -> Iterator[None]:
        setattr(module, SLOT, tap)
        try:
            yield
        finally:
            module.__dict__.pop(SLOT, None)

    return of_context(tapped)


# -------------------------------------------------------------------------------------------------------------------------- others


def _of_the_model(engine: Engine, site: Site, change: Change) -> Handle:
    parts = engine.parts
    if site.name == "embed" and parts.embed is not None:
        return on_output(parts.embed, change)
    if site.name in ("final_norm", "final_scale"):
        behind = [False]  # whether the last block has run: one module may norm the embeddings too (nanochat)

        def final(x: Tensor) -> Tensor | None:
            if not behind[0]:
                return None
            behind[0] = False
            return change(x)

        note = on_arguments(engine.blocks[-1], lambda _args, _kwargs: behind.__setitem__(0, True))
        if site.name == "final_norm" and parts.final_norm is not None:
            return all_of(note, on_output(parts.final_norm, final))
        if site.name == "final_scale" and parts.final_scale is not None:
            return all_of(note, _at_scale(parts.final_scale, final))
    if site.name == "logits":

        def hook(_module: nn.Module, _args: tuple, out: Any) -> Any:
            new = change(out.logits)
            return None if new is None else type(out)(**{**out, "logits": new})

        return Handle(lambda: engine.model.register_forward_hook(hook))
    raise SiteError(f"site {site} is not on this model: no module computes it that could be found")


def _in_block(engine: Engine, site: Site, change: Change, current: Current) -> Handle:
    b, name = site.index, site.name
    parts = engine.parts.blocks[b]
    change = current.guard(b, change)
    if name in STATE_SPACE:
        return at_state_space(engine, site, change)
    if name == "attn_in" and parts.attention is not None:
        return _shaped(engine, b, lambda c: on_read(parts.attention, c), change)  # type: ignore[arg-type]
    if name == "mlp_in" and parts.mlp is not None:
        return _shaped(engine, b, lambda c: on_read(parts.mlp, c), change)  # type: ignore[arg-type]
    if name == "neurons" and parts.mlp_down is not None:
        return _shaped(engine, b, lambda c: on_read(parts.mlp_down, c), change)  # type: ignore[arg-type]
    if name == "attn_scale" and parts.attn_norm is not None:
        return _shaped(engine, b, lambda c: _at_scale(parts.attn_norm, c), change)  # type: ignore[arg-type]
    if name == "mlp_scale" and parts.mlp_norm is not None:
        return _shaped(engine, b, lambda c: _at_scale(parts.mlp_norm, c), change)  # type: ignore[arg-type]
    if name == "router" and parts.router is not None:
        return _shaped(engine, b, lambda c: _at_router(parts, c), change)
    if name == "expert_out" and parts.experts is not None:
        return _at_experts(engine, b, parts.experts, change)
    if name == "head_out" and parts.heads and parts.heads_out is not None:
        return _at_head_out(engine, b, parts, change)
    raise SiteError(f"site {site} is not on this model: {_why(engine, site, parts)}")


def _why(engine: Engine, site: Site, parts: Parts) -> str:
    b = site.index
    if site.name in (*ATTENDED, "head_out"):
        what = type(parts.attention).__name__ if parts.attention is not None else "no attention module"
        return f"block {b} has {what}, in which no queries, keys and softmax were seen"
    if site.name in ("attn_scale", "mlp_scale"):
        return f"what the {site.name.split('_')[0]} of block {b} reads is not the output of a norm whose scale could be found"
    if site.name in ("router", "expert_out"):
        return f"block {b} has no mixture of experts whose parts could be found"
    if site.name == "neurons":
        return f"block {b} has no MLP with one last linear map (a mixture of experts has none: see expert_out)"
    return f"block {b} has no module that reads it"


def _shaped(engine: Engine, block: int, hook: Any, change: Change) -> Handle:
    """Passes on [batch, pos, width], also where the model runs all tokens in one row."""
    shape: list[tuple[int, int]] = []

    def shaped(x: Tensor) -> Tensor | None:
        if x.ndim > 2:
            return change(x)
        new = change(x.reshape(*shape[-1], -1))
        return None if new is None else new.reshape(x.shape)

    return all_of(
        on_arguments(engine.blocks[block], lambda args, _kw: shape.append(engine.rows_and_columns(args[0]))), hook(shaped)
    )


def _at_scale(norm: Norm, change: Change) -> Handle:
    def hook(_module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        x = first_input(args, kwargs)
        assert x is not None
        scale = norm.scale(x)
        new = change(scale.to(out.dtype))
        if new is None:
            return None
        bias = norm.bias.to(out)
        return ((out - bias).to(scale.dtype) * (scale / new.to(scale)) + bias).to(out.dtype)

    return Handle(lambda: norm.module.register_forward_hook(hook, with_kwargs=True))


def _at_router(parts: Parts, change: Change) -> Handle:
    assert parts.router is not None and parts.experts is not None
    count = next(p.shape[0] for p in parts.experts.parameters())
    done = [False]

    def call(function: Any, args: tuple, kwargs: dict) -> Any:
        out = function(*args, **kwargs)
        product = function in (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if done[0] or not product or out.shape[-1] != count:
            return out
        done[0] = True
        new = change(out)
        return out if new is None else new

    return all_of(on_arguments(parts.router, lambda _a, _k: done.__setitem__(0, False)), on_functions(parts.router, call))


def _at_experts(engine: Engine, block: int, experts: nn.Module, change: Change) -> Handle:
    """Experts are called with (x [row, d], indices [row, k], weights [row, k]) and give [row, d]."""
    count = next(p.shape[0] for p in experts.parameters())
    shape: list[tuple[int, int]] = []

    def hook(_module: nn.Module, args: tuple, out: Any) -> Any:
        x, indices, weights = args[:3]
        weights = weights if weights.shape == indices.shape else weights.gather(-1, indices)
        first = torch.zeros_like(weights)
        first[:, 0] = 1
        said = torch.stack([_forced(experts, args, torch.full_like(indices, e), first) for e in range(count)], 1)
        value = said.unflatten(0, shape[-1])
        new = change(value)
        if new is None:
            return None
        given = torch.zeros(len(x), count, dtype=weights.dtype, device=x.device).scatter(1, indices, weights)
        moved = out + ((new - value).flatten(0, 1) * given[..., None].to(new)).sum(1)
        return moved.to(out.dtype)

    note = on_arguments(engine.blocks[block], lambda args, _kw: shape.append(engine.rows_and_columns(args[0])))
    return all_of(note, Handle(lambda: experts.register_forward_hook(hook)))


def _forced(experts: nn.Module, args: tuple, index: Tensor, weight: Tensor) -> Tensor:
    out = experts.forward(args[0], index, weight, *args[3:])
    value = first_tensor(out)
    assert value is not None
    return value


def _at_head_out(engine: Engine, block: int, parts: Parts, change: Change) -> Handle:
    writer = engine.writer(Site("attn_out", block))
    maps, post = parts.heads_out, parts.attn_post
    assert maps is not None
    kept: dict[str, Any] = {}

    def tap_z(x: Tensor) -> None:
        kept["z"] = x

    def note_norm(x: Tensor) -> None:
        kept["scale"] = post.scale(x) if post is not None else None

    def add(out: Tensor) -> Tensor | None:
        heads = alone(maps, kept.pop("z"), parts.heads)
        if post is not None:
            heads = post.linear(heads, kept["scale"][..., None, :])
        heads = heads.to(out.dtype) * writer.scale
        new = change(heads)
        return None if new is None else out + ((new - heads).sum(-2) / writer.scale).reshape(out.shape)

    inner = [on_read(maps, tap_z)] + ([on_read(post.module, note_norm)] if post is not None else [])
    return all_of(*inner, on_output(writer.module, add))


def alone(maps: nn.Module, z: Float[Tensor, "batch pos flat"], heads: int) -> Float[Tensor, "batch pos head d_model"]:
    """What each head's share of z becomes in a linear map, whose bias is taken off."""
    nothing = maps.forward(torch.zeros_like(z[:1, :1]))
    share = z.unflatten(-1, (heads, -1))
    one = torch.eye(heads, dtype=z.dtype, device=z.device)
    return maps.forward((share[..., None, :, :] * one[:, :, None]).flatten(-2)) - nothing[..., None, :]
