"""One attention function of our own, in which scores, pattern and what goes in and out can be read and edited.

    scores  = scaling · q kᵀ  (through the soft-cap, if the model has one)  + mask        [batch, head, query, key]
    pattern = softmax(scores)   over keys, and over one more column where the model has attention sinks (gpt-oss)
    z       = pattern · v                                                                 [batch, query, head, d_head]

It is registered with `transformers` once and used only inside `switched`; outside, and after an exception, the model runs its own.
The function is called by the model with the module that asks; what a run wants there stands in that module's `SLOT`. It computes in
the model's number format, the softmax in float32 or better, as the models' own eager functions do.

Where rows share the keys of a prompt (`shared_prefix`), scores and mix are made in two parts, over the prompt's keys and the rows'
own, and laid side by side: scores and pattern are whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, eager_mask

from patchscopes.engine.shared_prefix import prefix_of

NAME = "patchscopes"  # of our function among the attention implementations
SLOT = "_patchscopes_tap"  # the attribute of a module where a run leaves its `Tap`


class Tap(Protocol):
    """What a run wants of one attention module: each value comes by, and the one returned is used instead."""

    def heads(self, name: str, value: Float[Tensor, "batch head pos d_head"]) -> Tensor:
        """name: "q", "k", "v" (key-value heads, before they are repeated) or "z"."""
        ...

    def edges(self, name: str, value: Float[Tensor, "batch head query key"]) -> Tensor:
        """name: "scores" (the mask is in them) or "pattern"."""
        ...


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as `transformers` asks for it: query [batch, head, q, d_head], key and value [batch, kv_head, k, d_head].

    Returns z [batch, q, head, d_head] and the pattern [batch, head, q, k].
    """
    z, pattern = attend_tapped(
        getattr(module, SLOT, None),
        query,
        key,
        value,
        attention_mask,
        scaling,
        softcap,
        s_aux if sinks is None else sinks,
        position_bias,
    )
    return z.transpose(1, 2).contiguous(), pattern


def attend_tapped(
    tap: Tap | None,
    query: Float[Tensor, "batch head q d"],
    key: Float[Tensor, "batch kv_head k d"],
    value: Float[Tensor, "batch kv_head k d_v"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
) -> tuple[Float[Tensor, "batch head q d_v"], Float[Tensor, "batch head q k"]]:
    """z and the pattern, with everything shown to `tap` on the way."""
    prefix = prefix_of(key)
    if tap is not None:
        query, key, value = tap.heads("q", query), tap.heads("k", key), tap.heads("v", value)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = match(query, key)
    if prefix is not None:
        scores = torch.cat([prefix.match(query), scores], -1)
    if attention_mask is not None and attention_mask.shape[-1] > scores.shape[-1]:
        raise RuntimeError(
            f"a mask over {attention_mask.shape[-1]} keys, but {scores.shape[-1]} keys: a prefix was lost on the way"
        )
    if prefix is not None and attention_mask is not None:
        attention_mask = prefix.masked(attention_mask)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    for bias in (position_bias, attention_mask):
        if bias is not None:
            if bias.dtype == torch.bool:
                scores = scores.masked_fill(~bias, torch.finfo(scores.dtype).min)
            else:
                scores = scores + bias[..., : scores.shape[-1]]
    if tap is not None:
        scores = tap.edges("scores", scores)
    pattern = _softmax(scores, sinks).to(query.dtype)
    if tap is not None:
        pattern = tap.edges("pattern", pattern)
    before = 0 if prefix is None else len(prefix)
    z = mix(pattern[..., before:], value)
    if prefix is not None:
        z = z + prefix.mix(pattern[..., :before])
    if tap is not None:
        z = tap.heads("z", z)
    return z, pattern


def match(query: Float[Tensor, "batch head q d"], key: Float[Tensor, "batch kv_head k d"]) -> Float[Tensor, "batch head q k"]:
    """q kᵀ. Heads that share keys (GQA) come one after the other, so they are folded into the queries, and no key is repeated."""
    return torch.matmul(_grouped(query, key), key.transpose(-1, -2)).reshape(*query.shape[:3], -1)


def mix(pattern: Float[Tensor, "batch head q k"], value: Float[Tensor, "batch kv_head k d"]) -> Float[Tensor, "batch head q d"]:
    """pattern · v, heads that share values folded into the queries."""
    return torch.matmul(_grouped(pattern, value), value).reshape(*pattern.shape[:3], -1)


def _grouped(x: Float[Tensor, "batch head q d"], other: Tensor) -> Float[Tensor, "batch kv_head grouped d"]:
    batch, heads, queries, width = x.shape
    kv_heads = other.shape[1]
    return x if heads == kv_heads else x.reshape(batch, kv_heads, heads // kv_heads * queries, width)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    kind = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return scores.softmax(-1, dtype=kind)
    if sinks.ndim < 4:  # one a head (gpt-oss), or one for each query (Inkling-2)
        sinks = sinks.reshape(1, -1, 1, 1)
    column = sinks.expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat([scores, column.to(scores)], -1).softmax(-1, dtype=kind)[..., :-1]


def _mask(
    q_length: int, *, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """The additive mask; None for a single query that sees all keys, so that nothing is added in a step of decoding."""
    if q_length == 1 and attention_mask is None and mask_function is causal_mask_function:
        return None
    return eager_mask(q_length=q_length, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


@contextmanager
def switched(model: Any) -> Iterator[None]:
    """Inside, `model` attends through `attend` (unless its code calls no registered function: the self-check finds out)."""
    if model.config._attn_implementation == NAME:
        yield
        return
    if NAME not in AttentionInterface():  # once a process; without a mask function of the same name the mask would be None
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, _mask)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs if hasattr(config, "_attn_implementation")]
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(_is_error)  # a family that cannot be switched is no news to warn of: it keeps its own attention
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        log.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
