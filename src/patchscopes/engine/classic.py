"""Attention in a model's own code (GPT-Neo, GPT-J, Bloom, MPT, Falcon), seen at its two products and its softmax.

    scores = q kᵀ …        the first product of two activations while the module runs
    pattern = softmax      of a tensor of their size
    z = pattern · v        the second product

Heads may be an axis of their own, [batch, head, …], or fused with the batch, [batch · head, …]. Where the model calls PyTorch's
`scaled_dot_product_attention` instead, `attend` computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from patchscopes.engine.attention import Tap, attend_tapped, switched
from patchscopes.engine.hooks import Handle, all_of, hooked, on_arguments, on_functions

PRODUCTS = {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}
PRODUCTS_ADDED = {torch.baddbmm, torch.Tensor.baddbmm}  # (bias, a, b)
SOFTMAX = {torch.softmax, nn.functional.softmax, torch.Tensor.softmax}


def at_products(module: nn.Module, tap: Tap) -> Handle:
    """A hook, not yet on, that shows the attention inside `module` to `tap`, in the shapes of `attend`."""
    state: dict[str, Any] = {"products": 0, "rows": 1}

    def unfused(x: Tensor) -> Tensor:
        return x if x.ndim == 4 else x.unflatten(0, (state["rows"], -1))

    def passed(see: Callable[[str, Tensor], Tensor], name: str, x: Tensor) -> Tensor:
        full = unfused(x)
        new = see(name, full)
        return x if new is full else new.reshape(x.shape).to(x.dtype)

    def call(function: Any, args: tuple, kwargs: dict) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            state["products"] = 2
            return _as_attend(tap, *args, **kwargs)
        if function in SOFTMAX and state["products"] == 1:
            name = "input" if "input" in kwargs else None
            scores = passed(tap.edges, "scores", kwargs["input"] if name else args[0])
            pattern = function(**{**kwargs, "input": scores}) if name else function(scores, *args[1:], **kwargs)
            return passed(tap.edges, "pattern", pattern)
        if function not in PRODUCTS and function not in PRODUCTS_ADDED:
            return function(*args, **kwargs)
        at = function in PRODUCTS_ADDED
        names = ("batch1", "batch2") if at else ("", "")
        found = [kwargs.get(name, args[at + k] if len(args) > at + k else None) for k, name in enumerate(names)]
        pair = [t for t in found if isinstance(t, Tensor) and not isinstance(t, nn.Parameter) and t.ndim >= 3]
        if len(pair) < 2:
            return function(*args, **kwargs)
        state["products"] += 1
        if state["products"] == 1:
            pair[0] = passed(tap.heads, "q", pair[0])
            pair[1] = passed(tap.heads, "k", pair[1].transpose(-1, -2)).transpose(-1, -2)
        elif state["products"] == 2:
            pair[1] = passed(tap.heads, "v", pair[1])
        rest = {k: v for k, v in kwargs.items() if k not in names}
        out = function(*args[:at], *pair, **rest)
        return passed(tap.heads, "z", out) if state["products"] == 2 else out

    def begin(args: tuple, kwargs: dict) -> None:
        read = next(t for t in (*args, *kwargs.values()) if torch.is_tensor(t))
        state.update(products=0, rows=read.shape[-3])

    return all_of(on_arguments(module, begin), on_functions(module, call))


def _as_attend(
    tap: Tap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return attend_tapped(tap, query, key, value, attn_mask, scale)[0]


def count_heads(model: Any, module: nn.Module, forward: Callable[[], Any]) -> int:
    """Heads of a module that attends in this way; 0 if it does not."""
    seen: dict[str, int] = {}

    class Look:
        def heads(self, name: str, value: Tensor) -> Tensor:
            seen[name] = value.shape[1]
            return value

        edges = heads

    with switched(model), hooked([at_products(module, Look())]):
        try:
            forward()
        except (RuntimeError, IndexError):  # products of other shapes than attention has
            return 0
    return seen["scores"] if "scores" in seen and seen.get("z") == seen["scores"] else 0
