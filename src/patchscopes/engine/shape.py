"""The shape of a model as costs see it: weights of its blocks, heads, keys and values, windows.

    P_b       matmul weights of block b that are active for a token; of experts the share k/E
    H, H_kv   heads of queries, and of keys and values; d_qk, d_v their widths
    W_b       bytes of block b

`measure` takes all of it from a loaded model: weights by their shapes, heads and widths from a cache that it filled. `sketch` takes heads
from the config instead, for a model whose weights are not here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchscopes.core.errors import RefusedError
from patchscopes.engine.engine import Engine

ACTIVE_EXPERTS = ("num_experts_per_tok", "experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")  # names seen in configs


@dataclass(frozen=True)
class BlockShape:
    """One block: P_b, W_b in bytes, H, H_kv, d_qk, d_v (0 without attention), and the window in tokens (None: all)."""

    weights: float
    n_bytes: int
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    window: int | None

    def attention(self, keys: int) -> int:
        """a_b(n): FLOP of one query over `keys` keys."""
        return 2 * self.heads * (self.d_qk + self.d_v) * self.seen(keys)

    def seen(self, keys: int) -> int:
        """Keys inside the window."""
        return keys if self.window is None else min(keys, self.window)


@dataclass(frozen=True)
class Shape:
    """A model as the floor sees it: its blocks, d_model · vocab, the head's bytes, bytes of a number (β)."""

    blocks: tuple[BlockShape, ...]
    head: int
    head_bytes: int
    element: int


def measure(engine: Engine) -> Shape:
    """The shape of a model, from its own weights and from a cache filled with one token."""
    config = engine.config.get_text_config(decoder=True)
    layers = _filled_cache(engine)
    blocks = tuple(_block(block, layers[b] if b < len(layers) else None, config) for b, block in enumerate(engine.blocks))
    head: Any = engine.model.get_output_embeddings()
    return Shape(blocks, head.weight.numel(), _n_bytes(head), head.weight.element_size())


@torch.no_grad()
def _filled_cache(engine: Engine) -> list[Any]:
    cache = engine.new_cache()
    if cache is None:
        return []
    engine.forward(torch.zeros(1, 1, dtype=torch.long, device=engine.device), cache=cache)
    return list(cache.layers)


def _block(block: nn.Module, cache: Any, config: Any) -> BlockShape:
    heads = kv_heads = d_qk = d_v = 0
    keys, values = getattr(cache, "keys", None), getattr(cache, "values", None)
    if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4:  # a recurrent block has none
        heads, kv_heads, d_qk, d_v = config.num_attention_heads, keys.shape[1], keys.shape[-1], values.shape[-1]
    window = getattr(cache, "sliding_window", None)
    return BlockShape(active_weights(block, config), _n_bytes(block), heads, kv_heads, d_qk, d_v, window)


def active_weights(block: nn.Module, config: Any) -> float:
    """P_b: matrices of the block, embeddings and biases left out; of experts, [E, …] or numbered modules, the share k/E."""
    active = next((getattr(config, name) for name in ACTIVE_EXPERTS if getattr(config, name, None)), None)
    total = 0.0
    for path, module in block.named_modules():
        if isinstance(module, (nn.Embedding, nn.Conv1d, nn.Conv2d)):
            continue
        numbered = re.search(r"^(.*\bexperts)\.\d+\b", path)  # a ModuleList of experts
        share = active / len(list(block.get_submodule(numbered[1]).children())) if numbered and active else 1
        for name, p in module.named_parameters(recurse=False):
            if "bias" in name:
                continue
            if p.ndim == 2:
                total += p.numel() * share
            elif p.ndim == 3 and active:  # all experts in one parameter
                total += p.numel() * active / p.shape[0]
    return total


def _n_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def sketch(model: nn.Module) -> Shape:
    """The shape of a model that cannot run, on the device "meta", say: heads, widths and windows from its config.

    Blocks are the longest list of modules that has as many as the config has layers.
    """
    given: Any = model
    config = given.config.get_text_config(decoder=True)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    if not lists:
        raise RefusedError(
            f"a {type(model).__name__} shows no list of its {config.num_hidden_layers} blocks; load it to plan with it"
        )
    blocks = max(lists, key=lambda some: sum(p.numel() for p in some.parameters()))
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or [None] * len(blocks)
    window = getattr(config, "sliding_window", None)
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    shapes = tuple(
        BlockShape(active_weights(block, config), _n_bytes(block), heads, kv_heads, d_head, d_head, windows[b])
        for b, block in enumerate(blocks)
    )
    head: Any = given.get_output_embeddings()
    return Shape(shapes, head.weight.numel(), _n_bytes(head), head.weight.element_size())
