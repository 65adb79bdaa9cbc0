"""Gradients of a number that a run gives, with respect to what stands at sites, to the values of edits, and to features.

    ∂m/∂x[site]   exact, by autograd through the model's own forward; rows are independent, so one backward pass serves them all
    J t           how values move along a tangent t at a site: forward-mode, in one pass

Nothing else requires gradients: weights are switched off while it runs, and back on after it. With checkpointing blocks keep only
what they read, and run a second time on the way back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as checkpointed

from patchscopes.core.coordinates import Coordinates
from patchscopes.core.errors import InputError, RefusedError, VectorError
from patchscopes.core.finite import require_finite
from patchscopes.core.sites import Site
from patchscopes.engine.edits import Placed
from patchscopes.engine.engine import Engine
from patchscopes.engine.hooks import hooked
from patchscopes.engine.places import at_sites
from patchscopes.engine.refuse import refuse_quantised
from patchscopes.engine.run import Batch, Run, batched, finished, side_by_side
from patchscopes.engine.watch import Watch

Metric = Callable[[Run], Tensor]


@dataclass(frozen=True, eq=False)
class Gradients:
    """g["resid.3"] is ∂ metric / ∂ resid.3, in the shape of run["resid.3"]; of each prompt's own metric.

    metric    [batch], or [] if the metric was one number for all
    edits     for each edit, in the order given, ∂ metric / ∂ value, summed over the prompts and sites where it (or another edit with
              the same tensor) was made; None without a value
    features  "resid.3" -> ∂ metric / ∂ features, where a coordinate system hangs
    """

    run: Run
    metric: Tensor
    at: Run
    edits: list[Tensor | None]
    features: dict[str, Tensor]

    def __getitem__(self, site: str) -> Tensor:
        """∂ metric / ∂ what stands at the site."""
        return self.at[site]


@dataclass(frozen=True, eq=False)
class Tangents:
    """How values moved: t["resid.9"] like run["resid.9"]; logits [batch, pos, vocab]."""

    run: Run
    moved: Run

    def __getitem__(self, site: str) -> Tensor:
        """J · tangent at the site."""
        return self.moved[site]

    @property
    def logits(self) -> Tensor:
        """J · tangent at the logits."""
        return self.moved.logits


def gradients(
    engine: Engine,
    prompts: Sequence[Int[Tensor, "1 _"]],
    metric: Metric,
    sites: Sequence[Site],
    edits: Sequence[Placed],
    *,
    padding_exact: bool,
    values: Sequence[Tensor | None] = (),
    coordinates: Mapping[Site, Coordinates] | None = None,
    checkpoint: bool | None = None,
) -> Gradients:
    """See `Model.gradients`. `values`: of the edits as they were given; those of one tensor (also one Edit over several prompts or
    sites) share its gradient."""
    refuse_quantised(engine.model)
    if any(site.name == "state" for site in (*sites, *(e.site for e in edits))):
        raise RefusedError(
            "gradients at recurrent states are not taken: they live in the cache, between passes. Take attn_in instead"
        )
    if len({p.shape[1] for p in prompts}) > 1 and not padding_exact:
        raise RefusedError(
            "on this model a padded row is not what it would be alone: take gradients of prompts of one length together"
        )
    if checkpoint is None:
        try:
            return _gradients(engine, prompts, metric, sites, edits, values, coordinates, False)
        except torch.OutOfMemoryError:  # once more, keeping less; if that is too much too, it is raised
            torch.cuda.empty_cache()
            checkpoint = True
    return _gradients(engine, prompts, metric, sites, edits, values, coordinates, checkpoint)


def _gradients(
    engine: Engine,
    prompts: Sequence[Tensor],
    metric: Metric,
    sites: Sequence[Site],
    edits: Sequence[Placed],
    values: Sequence[Tensor | None],
    coordinates: Mapping[Site, Coordinates] | None,
    checkpoint: bool,
) -> Gradients:
    leaves = {id(e.value): e.value.detach().requires_grad_() for e in edits if e.value is not None}
    some = [e if e.value is None else replace(e, value=leaves[id(e.value)]) for e in edits]
    batch = batched(prompts, engine.device)
    watch = Watch(engine, sites, some, batch.frame, coordinates=coordinates, graph=True)
    with frozen(engine.model), torch.enable_grad(), hooked(watch.hooks()), _saving(engine, watch, checkpoint):
        logits = engine.forward(batch.ids, mask=batch.padded, positions=batch.positions)
        run = finished(watch, logits, batch.mask)
        value = metric(run)
        _check_metric(value, len(prompts))
        inputs = {**{("at", site): x for site, x in watch.values.items()}, **{("edit", k): x for k, x in leaves.items()}}
        inputs |= {("feature", site): f for site, f in watch.features.items()}
        found = torch.autograd.grad(value.sum(), list(inputs.values()), allow_unused=True)
    got = {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(inputs.items(), found, strict=True)}
    plain = replace(
        run,
        logits=run.logits.detach(),
        values={s: v.detach() for s, v in run.values.items()},
        features={s: f.detach() for s, f in run.features.items()},
    )
    at = replace(plain, values={site: got["at", site] for site in run.values})
    per_edit = [None if v is None else got.get(("edit", id(v)), torch.zeros_like(v)) for v in values]
    return Gradients(plain, value.detach(), at, per_edit, {str(s): got["feature", s] for s in watch.features})


def _check_metric(value: Any, rows: int) -> None:
    if not torch.is_tensor(value) or value.shape not in ((), (rows,)):
        shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise InputError(f"the metric gave {shape}; expected one number for each prompt, ({rows},), or one for all, ()")
    if not value.requires_grad:
        raise InputError(
            "the metric does not depend on the run through anything that has a gradient; expected a function of its values"
        )


def unembedded(engine: Engine, h: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Logits of residuals as `Engine.unembed` gives them, as part of the graph of h."""
    ids = torch.zeros(len(h), 1, dtype=torch.long, device=engine.device)
    start = engine.at_layer(0, lambda _x: h.unsqueeze(-2))
    with frozen(engine.model), torch.enable_grad(), engine.bypassing(engine.n_layers), hooked([start]):
        return engine.forward(ids)[:, 0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no weight requires a gradient."""
    some = [p for p in model.parameters() if p.requires_grad]
    for p in some:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in some:
            p.requires_grad_(True)


@contextmanager
def _saving(engine: Engine, watch: Watch, on: bool) -> Iterator[None]:
    """Inside, blocks are checkpointed. Their forward is replaced on the instance, where accelerate keeps a wrapper too."""
    if not on:
        yield
        return
    saved = [(block, block.__dict__.get("forward")) for block in engine.blocks]

    def wrap(b: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            watch.current.block = b  # hooks on the block do not fire the second time
            return forward(*args, **kwargs)

        return lambda *args, **kwargs: checkpointed(inner, *args, use_reentrant=False, **kwargs)

    try:
        for b, (block, _) in enumerate(saved):
            block.forward = wrap(b, block.forward)
        yield
    finally:
        for block, forward in saved:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def jvp(
    engine: Engine,
    prompts: Sequence[Int[Tensor, "1 _"]],
    site: Site,
    tangent: Float[Tensor, "..."],
    sites: Sequence[Site],
    *,
    padding_exact: bool,
) -> Tangents:
    """See `Model.jvp`. Where a model calls what has no forward-mode (custom functions, grouped products of experts), two backward
    passes give the same: Jᵀu is linear in u, and its derivative along u is J t."""
    refuse_quantised(engine.model)
    require_finite(tangent, f"the tangent at {site}")
    if len({p.shape[1] for p in prompts}) > 1 and not padding_exact:
        if tangent.ndim > site.features:
            raise InputError(
                f"on this model prompts of different lengths run apart, but the tangent at {site} has the shape {tuple(tangent.shape)}, "
                "an entry for each token of all; give one prompt at a time, or one tangent for all tokens"
            )
        both = [jvp(engine, [p], site, tangent, sites, padding_exact=True) for p in prompts]
        longest = max(p.shape[1] for p in prompts)
        return Tangents(side_by_side([b.run for b in both], longest), side_by_side([b.moved for b in both], longest))
    batch = batched(prompts, engine.device)
    try:
        with warnings.catch_warnings():
            # torch 2.13 compiles its rules for forward-mode by a function that it has deprecated itself
            warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
            values, moved = _forward_mode(engine, batch, site, tangent, sites)
    except NotImplementedError:  # what torch raises where an operator has no forward-mode
        values, moved = _twice_backward(engine, batch, site, tangent, sites)

    def as_run(found: dict[Site | None, Tensor]) -> Run:
        return Run(found[None], batch.mask, {s: v for s, v in found.items() if s is not None}, engine.n_layers)

    return Tangents(as_run(values), as_run(moved))


def _along(tangent: Tensor, x: Tensor, site: Site) -> Tensor:
    try:
        return tangent.to(x).expand_as(x).clone()
    except RuntimeError:
        raise VectorError(f"the tangent at {site} has the shape {tuple(tangent.shape)}; expected {tuple(x.shape)}") from None


def _forward_mode(
    engine: Engine, batch: Batch, site: Site, tangent: Tensor, sites: Sequence[Site]
) -> tuple[dict[Site | None, Tensor], dict[Site | None, Tensor]]:
    """Values and their tangents, of the logits under None. SDPA's fused kernels have no forward-mode: PyTorch's plain one runs."""
    values: dict[Site | None, Tensor] = {}
    moved: dict[Site | None, Tensor] = {}

    def split(which: Site | None, x: Tensor) -> None:
        primal, along = forward_ad.unpack_dual(x)
        values[which], moved[which] = primal.clone(), torch.zeros_like(primal) if along is None else along.clone()

    def start(x: Tensor) -> Tensor:
        dual = forward_ad.make_dual(x.clone(), _along(tangent, x, site))
        if site in sites:
            split(site, dual)
        return dual

    def look(which: Site) -> Callable[[Tensor], None]:
        return lambda x: split(which, x)

    changes: dict[Site, Any] = {which.whole: look(which.whole) for which in sites}
    hooks = at_sites(engine, {**changes, site: start})
    with frozen(engine.model), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), hooked(hooks):
        split(None, engine.forward(batch.ids, mask=batch.padded, positions=batch.positions))
    return values, moved


def _twice_backward(
    engine: Engine, batch: Batch, site: Site, tangent: Tensor, sites: Sequence[Site]
) -> tuple[dict[Site | None, Tensor], dict[Site | None, Tensor]]:
    """The same through d/du ⟨Jᵀu, t⟩. Slower, and it needs a backward pass that can itself be differentiated."""
    some = list(dict.fromkeys([*(s.whole for s in sites), site]))
    watch = Watch(engine, some, (), batch.frame, graph=True)
    with frozen(engine.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), hooked(watch.hooks()):
        logits = engine.forward(batch.ids, mask=batch.padded, positions=batch.positions)
        x = watch.values[site]
        along = _along(tangent, x.detach(), site)
        outs: dict[Site | None, Tensor] = {None: logits, **{s.whole: watch.values[s.whole] for s in sites}}
        moved: dict[Site | None, Tensor] = {}
        for which, out in outs.items():
            u = torch.zeros_like(out, requires_grad=True)
            (back,) = torch.autograd.grad(out, x, u, create_graph=True, retain_graph=True, allow_unused=True)
            known = (
                None if back is None else torch.autograd.grad((back * along).sum(), u, retain_graph=True, allow_unused=True)[0]
            )
            moved[which] = torch.zeros_like(out) if known is None else known.detach()
    return {which: out.detach() for which, out in outs.items()}, moved
