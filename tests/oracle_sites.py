"""Any edits at any sites, one prompt at a time, without padding or cache: plain hooks, and the family's own eager attention watched.

Written against transformers alone: nothing of patchscopes is imported here.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch as replaced

import torch
from families import DEPTH, LAYOUT, WRITERS, blocks_of
from torch import Tensor, nn

INNER = ("q", "k", "v", "z")
EDGES = ("scores", "pattern")
LAST_MAPS = ("down_proj", "c_proj", "dense_4h_to_h")  # of an MLP


@dataclass(frozen=True, eq=False)
class Written:
    """One edit: at the positions (and keys) of one prompt `value` [width], or [position, width], with heads between; or None."""

    site: str
    positions: list[int]
    write: str
    value: Tensor | None = None
    amount: float = 1.0
    head: int | None = None
    keys: list[int] = field(default_factory=list)

    def on(self, x: Tensor) -> Tensor:
        """x [pos, (head,) width], or [head, query, key], with it made."""
        x = x.clone()
        name = self.site.split(".")[0]
        for n, p in enumerate(self.positions):
            if name in EDGES:
                heads = range(len(x)) if self.head is None else [self.head]
                for m, k in enumerate(self.keys):
                    for h in heads:
                        if self.write == "knock_out":
                            x[h, p, k] = -torch.inf if name == "scores" else 0
                        else:
                            x[h, p, k] = self._made(x[h, p, k], None if self.value is None else self.value[n, m])
                continue
            value = None if self.value is None else self.value[n]
            if self.head is None:
                x[p] = self._made(x[p], value)
            else:
                x[p, self.head] = self._made(x[p, self.head], value)
        return x

    def _made(self, x: Tensor, v: Tensor | None) -> Tensor:
        if v is None:
            assert self.write == "scale"
            return x * self.amount
        if self.write == "replace":
            return v.expand_as(x)
        if self.write == "mask":
            return x * v
        if self.write == "interpolate":
            return (1 - self.amount) * x + self.amount * v
        longer = x.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True) if self.write.endswith("_matched") else 1
        return (0 if self.write == "replace_matched" else x) + self.amount * longer * v


def blocks_in(hf: nn.Module, family: str) -> nn.ModuleList | None:
    """The blocks, if the residual between them is [batch, pos, d_model]."""
    if family in LAYOUT:
        return None
    try:
        return blocks_of(hf, family)
    except KeyError:
        lists = [m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == DEPTH]
        return lists[0] if len(lists) == 1 else None


Seen = Callable[[str, Tensor], Tensor]  # (site, value of one prompt): what takes its place


@contextmanager
def watched(hf: Any, family: str, see: Seen, attends: dict[nn.Module, int]) -> Iterator[None]:
    """Inside, every site of one prompt goes through `see`. attends: attention modules that may be watched, and their blocks."""
    blocks = blocks_in(hf, family)
    assert blocks is not None
    attention, mlp, factor = WRITERS.get(family, (None, None, 1))

    def through(site: str, x: Tensor, by: float = 1) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]) * by
        new = see(site, flat)
        return x if new is flat else (new / by).reshape(x.shape)

    def enters(site: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (through(site, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": through(site, kwargs["hidden_states"])}

        return hook

    def leaves(site: str, by: float = 1) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> Tensor | tuple:
            if isinstance(out, (tuple, list)):
                return type(out)([through(site, out[0], by), *out[1:]])
            return through(site, out, by)

        return hook

    handles = []
    for b, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(enters(f"resid.{b}"), with_kwargs=True))
        for name, path in (("attn_out", attention), ("mlp_out", mlp)):
            if path is not None:
                handles.append(block.get_submodule(path).register_forward_hook(leaves(f"{name}.{b}", factor)))
        inside = None if hasattr(block, "experts") else getattr(block, "mlp", None)  # what the MLP is there is a matter of taste
        last = next((m for name in LAST_MAPS if (m := getattr(inside, name, None)) is not None), None)
        if inside is not None and last is not None and isinstance(getattr(last, "weight", None), nn.Parameter):
            handles.append(inside.register_forward_pre_hook(enters(f"mlp_in.{b}"), with_kwargs=True))
            handles.append(last.register_forward_pre_hook(enters(f"neurons.{b}"), with_kwargs=True))
        gate = getattr(inside, "gate", None)
        if family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe") and gate is not None:
            handles += _at_linear(gate, lambda x, b=b: through(f"router.{b}", x))
    handles.append(blocks[-1].register_forward_hook(leaves(f"resid.{len(blocks)}")))
    for module, b in attends.items():
        handles.append(module.register_forward_pre_hook(enters(f"attn_in.{b}"), with_kwargs=True))
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(_eager(hf, see, attends))
        yield


def _at_linear(module: nn.Module, change: Callable[[Tensor], Tensor]) -> list[Any]:
    """The linear map that a router makes somewhere in its forward."""
    linear, state = nn.functional.linear, ExitStack()

    def begin(_module: nn.Module, _args: tuple) -> None:
        state.enter_context(replaced.object(nn.functional, "linear", lambda *args, **kw: change(linear(*args, **kw))))

    return [
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(lambda _m, _a, _o: state.close(), always_call=True),
    ]


@contextmanager
def _eager(hf: Any, see: Seen, attends: dict[nn.Module, int]) -> Iterator[None]:
    """The family's own eager attention, with what goes in and out of it, and of its softmax, passed through `see`."""
    before, softmax = hf.config._attn_implementation, nn.functional.softmax

    def wrap(eager: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            if module not in attends:
                return eager(module, q, k, v, *args, **kwargs)
            b = attends[module]

            def heads(name: str, x: Tensor) -> Tensor:
                return see(f"{name}.{b}", x[0].transpose(0, 1)).transpose(0, 1)[None]

            def softened(x: Tensor, *rest: Any, **options: Any) -> Tensor:
                x = see(f"scores.{b}", x[0])[None]
                return see(f"pattern.{b}", softmax(x, *rest, **options)[0])[None]

            with replaced.object(nn.functional, "softmax", softened):
                z, pattern = eager(module, heads("q", q), heads("k", k), heads("v", v), *args, **kwargs)
            return see(f"z.{b}", z[0])[None], pattern

        return wrapped

    homes = {type(m).__module__ for m in attends}
    with ExitStack() as stack:
        for home in homes:
            module = sys.modules[home]
            stack.enter_context(replaced.object(module, "eager_attention_forward", wrap(module.eager_attention_forward)))
        if attends:
            stack.callback(hf.set_attn_implementation, before)
            hf.set_attn_implementation("eager")
        yield


def attention_in(hf: nn.Module, family: str, ids: Sequence[int]) -> dict[nn.Module, int]:
    """Attention modules and their blocks: those that call their file's eager attention once in a pass, without sinks."""
    blocks = blocks_in(hf, family)
    assert blocks is not None
    own = {
        module: b
        for b, block in enumerate(blocks)
        for module in block.modules()
        if hasattr(sys.modules[type(module).__module__], "eager_attention_forward") and not hasattr(module, "sinks")
    }
    calls: Counter[str] = Counter()
    numbers = {module: n for n, module in enumerate(own)}

    def count(site: str, x: Tensor) -> Tensor:
        calls[site] += site.startswith("z") or x.shape[-1] == len(ids)  # Inkling-2 has sinks of its own
        return x

    with _eager(hf, count, numbers), torch.no_grad():
        hf(torch.tensor([list(ids)]), use_cache=False)
    asked = {module: b for module, b in own.items() if calls[f"pattern.{numbers[module]}"] == calls[f"z.{numbers[module]}"] == 1}
    alone = Counter(asked.values())
    return {module: b for module, b in asked.items() if alone[b] == 1}  # LongCat-Flash has two in a block


@torch.no_grad()
def pass_with(
    hf: nn.Module, family: str, ids: Sequence[int], edits: Sequence[Written], attends: dict[nn.Module, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [pos, vocab] and the value of every site known, [pos, …] or [head, query, key], the edits made in the order given."""
    seen: dict[str, Tensor] = {}

    def see(site: str, x: Tensor) -> Tensor:
        mine = [edit for edit in edits if edit.site == site]
        for edit in mine:
            x = edit.on(x)
        seen[site] = x.clone()
        return x

    with watched(hf, family, see, attends):
        logits = hf(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits, seen
