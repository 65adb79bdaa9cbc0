"""The parts inside the blocks, found by what they compute and not by their names: one pass over a few tokens, every module watched.

    attention   the module that asks our attention function; in a model that never does, the child of the block that holds the first
                residual writer. What it reads is attn_in.
    attn_norm   the module whose output attn_in is, if it divides by a scale of what it reads:
                out = w · (x − mean) / s + c,  s = sqrt(variance + eps)  (LayerNorm), or without the mean and c (RMSNorm)
    heads_out   the last linear map inside the attention, z · W_O, if what it says is what the first writer adds, as it is or
                through a norm (attn_post)
    mlp         the module whose output the second writer writes; its last linear map reads the neurons
    gated_norm  the module inside a state-space mixer that reads the scan's output and a gate
    router      the module that computes one logit for each expert;  experts  the module called with (x, indices, weights)

A part that a block has not is None, and sites that need it are refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchscopes.engine.anatomy import Anatomy
from patchscopes.engine.attention import SLOT, switched
from patchscopes.engine.classic import count_heads
from patchscopes.engine.hooks import Handle, first_input, first_tensor, hooked, on_arguments
from patchscopes.engine.state_space import sites_of
from patchscopes.engine.tolerance import tolerance

FITS = 1e-4  # relative error below which a module is what its formula says


@dataclass(frozen=True, eq=False)
class Norm:
    """A module that computes weight · (x − mean) / s + bias; the mean and the bias only if `centred`."""

    module: nn.Module
    centred: bool
    eps: float
    weight: Tensor
    bias: Tensor

    def scale(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row 1"]:
        """s, what x is divided by."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def linear(self, x: Float[Tensor, "*row d_model"], scale: Float[Tensor, "*row 1"]) -> Float[Tensor, "*row d_model"]:
        """What a part of the norm's input becomes when the whole is divided by `scale`: without the bias."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return self.weight.to(x) * (x / scale.to(x))


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one block; see above. `attends`: through our function; `heads`: query heads, 0 if it is no attention;
    `twice`: it attends more than once in a pass, to other values each time (DiffLlama)."""

    attention: nn.Module | None
    attends: bool
    heads: int
    attn_norm: Norm | None
    heads_out: nn.Module | None
    attn_post: Norm | None
    mlp: nn.Module | None
    mlp_norm: Norm | None
    mlp_down: nn.Module | None
    router: nn.Module | None
    experts: nn.Module | None
    gated_norm: nn.Module | None
    state_space: frozenset[str] = frozenset()
    twice: bool = False


@dataclass(frozen=True, eq=False)
class AllParts:
    """The parts of every block, the final norm and the module of the token embeddings and of the logits."""

    blocks: list[Parts]
    final_norm: nn.Module | None
    final_scale: Norm | None
    embed: nn.Module | None


@dataclass(eq=False)
class _Seen:
    """One module in one pass."""

    path: str
    module: nn.Module
    inputs: tuple
    read: Tensor | None = None
    out: Any = None

    @property
    def wrote(self) -> Tensor | None:
        return first_tensor(self.out)


@torch.no_grad()
def find_parts(model: Any, anatomy: Anatomy, forward: Callable[[], Tensor]) -> AllParts:
    """The parts of a model. `forward` runs it on some tokens and gives the logits."""
    blocks = anatomy.blocks
    plain = forward()
    seen, asked, calls, through_ours = _watch(model, forward)
    off = float((through_ours - plain).float().abs().max() / plain.float().abs().max())
    # not so where sparse attention (DeepSeek-V3.2) chooses keys by the form of the mask
    ours = off <= tolerance(plain.dtype, plain.device)
    inside = [_inside(block, path, seen) for block, path in ((b, f"{anatomy.blocks_path}.{i}.") for i, b in enumerate(blocks))]
    parts = [_parts_of(inside[b], asked if ours else {}, anatomy.writers[b]) for b in range(len(blocks))]
    for b, p in enumerate(parts):  # attention in the model's own code: in the module found, or in one of the block's children
        children = [one.module for one in inside[b] if "." not in one.path]
        for module in [p.attention] if p.attention is not None else children:
            heads = count_heads(model, module, forward) if ours and not p.heads else 0
            if heads:
                parts[b] = replace(p, attention=module, heads=heads)
                break
    for b, p in enumerate(parts):
        if p.attention is not None and not p.heads:
            parts[b] = replace(p, state_space=sites_of(p.attention, p.gated_norm, forward))
    entries = Counter(one.module for one in seen)
    parts = [replace(p, twice=p.attention is not None and calls[p.attention] > entries[p.attention]) for p in parts]
    head = model.get_output_embeddings()
    entered = next((s for s in seen if s.module is head), None)
    norm = _producer(seen[seen.index(entered) :: -1], entered.read) if entered is not None and entered.read is not None else None
    return AllParts(
        parts, None if norm is None else norm.module, None if norm is None else as_norm(norm), model.get_input_embeddings()
    )


def _watch(model: Any, forward: Callable[[], Tensor]) -> tuple[list[_Seen], dict[nn.Module, int], Counter[nn.Module], Tensor]:
    """All modules in the order in which they begin, with copies of what they read and wrote; which asked for attention, for how
    many heads and how often; and the logits that came of it."""
    seen: list[_Seen] = []
    open_: list[_Seen] = []
    asked: dict[nn.Module, int] = {}
    calls: Counter[nn.Module] = Counter()

    def watch(path: str, module: nn.Module) -> list[Handle]:
        def enter(args: tuple, kwargs: dict) -> None:
            read = first_input(args, kwargs)
            one = _Seen(path, module, args, None if read is None else read.clone())
            seen.append(one)
            open_.append(one)

        def leave(_module: nn.Module, _args: tuple, out: Any) -> None:
            wrote = first_tensor(out)
            one = next(o for o in reversed(open_) if o.module is module)
            open_.remove(one)
            one.out = out if wrote is None else (wrote.clone(), *out[1:]) if isinstance(out, tuple) else wrote.clone()

        return [on_arguments(module, enter), Handle(lambda: module.register_forward_hook(leave))]

    class Asked:
        def __init__(self, module: nn.Module):
            self.module = module

        def heads(self, _name: str, value: Tensor) -> Tensor:
            return value

        def edges(self, name: str, value: Tensor) -> Tensor:
            asked[self.module] = value.shape[1]
            calls[self.module] += name == "scores"
            return value

    modules = [(path, m) for path, m in model.named_modules() if path and not isinstance(m, nn.ModuleList)]
    try:
        for _, module in modules:
            setattr(module, SLOT, Asked(module))
        with switched(model), hooked(h for path, module in modules for h in watch(path, module)):
            logits = forward()
    finally:
        for _, module in modules:
            module.__dict__.pop(SLOT, None)
    return seen, asked, calls, logits


def _inside(block: nn.Module, path: str, seen: Sequence[_Seen]) -> list[_Seen]:
    """What ran between the beginning of `block` and the next module that is none of its own."""
    own = set(block.modules()) - {block}
    found = []
    for one in seen:
        if one.module in own and one.path.startswith(path):
            found.append(_Seen(one.path.removeprefix(path), one.module, one.inputs, one.read, one.out))
    return found


def _parts_of(inside: list[_Seen], asked: Mapping[nn.Module, int], writers: Sequence) -> Parts:
    of = {one.module: one for one in inside}
    first = of.get(writers[0].module) if writers else None
    attention = next((one for one in inside if one.module in asked), None)
    attends = attention is not None
    if attention is None and first is not None:
        top = first.path.split(".")[0]
        attention = next((one for one in inside if one.path == top), None)
    heads = 0 if attention is None else asked.get(attention.module, 0)
    heads_out = None
    if attention is not None:
        linear = [o for o in inside if o.path.startswith(f"{attention.path}.") and _is_linear(o)]
        heads_out = linear[-1] if linear else None
    post = None
    if first is not None and heads_out is not None and not _same(first.wrote, heads_out.wrote):
        post = as_norm(first) if _same(first.read, heads_out.wrote) else None
        heads_out = heads_out if post is not None else None  # what the writer adds is not (only) what the heads say (Falcon-H1)
    second = of.get(writers[1].module) if len(writers) > 1 else None
    mlp, down = _mlp(inside, second, attention)
    router, experts = _mixture(inside)
    return Parts(
        attention=attention and attention.module,
        attends=attends,
        heads=heads,
        attn_norm=_norm_before(inside, attention),
        heads_out=heads_out and heads_out.module,
        attn_post=post,
        mlp=mlp and mlp.module,
        mlp_norm=_norm_before(inside, mlp),
        mlp_down=down and down.module,
        router=router and router.module,
        experts=experts and experts.module,
        gated_norm=_gated_norm(inside, attention),
    )


def _mlp(inside: list[_Seen], writer: _Seen | None, attention: _Seen | None) -> tuple[_Seen | None, _Seen | None]:
    """The module that reads what the MLP reads, and its last linear map."""
    if writer is None:
        return None, None
    lower = attention.path + "." if attention is not None else "?"
    others = [o for o in inside if not o.path.startswith(lower) and o is not attention]
    wrote = writer.read if as_norm(writer) is not None else writer.wrote
    # the outermost module whose output it is; in a block without an MLP module (OPT) the linear maps themselves
    makers = [o for o in others if _same(o.wrote, wrote) and (o.module is not writer.module or as_norm(writer) is None)]
    if not makers:
        top = writer.path.split(".")[0]
        makers = [o for o in others if o.path == top]
    if not makers:
        return None, None
    made = min(makers, key=lambda o: o.path.count("."))
    if "." in writer.path and as_norm(writer) is None:  # Bloom and MPT add the residual inside the MLP: its writer lies deeper
        made = next((o for o in others if o.path == writer.path.split(".")[0]), made)
    linear = [o for o in others if _is_linear(o) and (o.path.startswith(f"{made.path}.") or o is made)]
    down = linear[-1] if linear and (_same(linear[-1].wrote, wrote) or _same(linear[-1].wrote, made.wrote)) else None
    if made is down:  # no module around them: the first linear map after the attention reads
        began = inside.index(attention) if attention is not None else 0
        made = next(o for o in others if inside.index(o) > began and _is_linear(o))
    return made, down


def _mixture(inside: list[_Seen]) -> tuple[_Seen | None, _Seen | None]:
    """The router and the experts: experts are called with (x [row, d], indices [row, k], weights [row, k])."""

    def routed(one: _Seen) -> bool:
        t = [x for x in one.inputs if torch.is_tensor(x)]
        return len(t) >= 3 and t[0].ndim == 2 == t[1].ndim and not t[1].is_floating_point() and t[2].is_floating_point()

    experts = next((o for o in inside if routed(o)), None)
    if experts is None:
        return None, None
    count = next(p.shape[0] for p in experts.module.parameters())
    before = inside[: inside.index(experts)]

    def scores(one: _Seen) -> bool:
        outs = one.out if isinstance(one.out, tuple) else (one.out,)
        return any(torch.is_tensor(t) and t.is_floating_point() and t.shape[-1] == count for t in outs)

    routers = [o for o in before if scores(o) and any(p.shape[0] == count for p in o.module.parameters() if p.ndim == 2)]
    return (min(routers, key=lambda o: o.path.count(".")) if routers else None), experts


def _gated_norm(inside: list[_Seen], mixer: _Seen | None) -> nn.Module | None:
    def gated(one: _Seen) -> bool:
        t = [x for x in one.inputs if torch.is_tensor(x)]
        return len(t) == 2 and t[0].shape == t[1].shape and t[1].is_floating_point() and not list(one.module.children())

    inner = [o for o in inside if mixer is not None and o.path.startswith(f"{mixer.path}.")]
    return next((o.module for o in inner if gated(o)), None)


def _norm_before(inside: list[_Seen], reader: _Seen | None) -> Norm | None:
    if reader is None or reader.read is None:
        return None
    made = _producer(inside[inside.index(reader) :: -1], reader.read)
    return None if made is None else as_norm(made)


def _producer(before: Sequence[_Seen], value: Tensor) -> _Seen | None:
    """The last module without children to have written `value`."""
    return next((o for o in before[1:] if not list(o.module.children()) and _same(o.wrote, value)), None)


def _is_linear(one: _Seen) -> bool:
    weight = getattr(one.module, "weight", None)
    return weight is not None and weight.ndim == 2 and one.read is not None and one.read.is_floating_point()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())


def as_norm(one: _Seen) -> Norm | None:
    """The norm that a module is, or None: tried on inputs of many lengths, short ones too, on which its eps shows."""
    if list(one.module.children()) or one.read is None or one.wrote is None or one.read.shape != one.wrote.shape:
        return None
    width = one.read.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, width, generator=generator) * torch.logspace(-4, 1, 16)[:, None] + 0.1 * torch.randn(
        16, 1, generator=generator
    )
    x = x.to(one.read)
    try:
        out = one.module.forward(x).double().cpu()
    except (RuntimeError, TypeError, ValueError, IndexError):  # a module of another kind: whatever it makes of such an input
        return None
    x = x.cpu()  # least squares are solved there: a GPU has fewer ways
    names = [float(v) for k, v in vars(one.module).items() if "eps" in k and isinstance(v, float)]
    for centred in (False, True):
        for eps in (*names, 0.0, 1e-6, 1e-5):
            y = x.double() - x.double().mean(-1, keepdim=True) if centred else x.double()
            unit = y / (y.pow(2).mean(-1, keepdim=True) + eps).sqrt()
            columns = torch.stack([unit, torch.ones_like(unit)], -1) if centred else unit[..., None]
            fit = torch.linalg.lstsq(columns.transpose(0, 1), out.T[..., None]).solution[..., 0]  # [width, 1 or 2]
            off = (torch.einsum("rwc,wc->rw", columns, fit) - out).abs().max() / out.abs().max()
            if float(off) < (FITS if x.dtype in (torch.float32, torch.float64) else 2e-2):
                bias = fit[:, 1] if centred else torch.zeros_like(fit[:, 0])
                return Norm(one.module, centred, eps, fit[:, 0].to(one.read), bias.to(one.read))
    return None
