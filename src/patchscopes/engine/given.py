"""What a model reads beside the tokens of its prompt: an encoded text, or images.

* An encoder–decoder reads a text with its encoder, once; every pass of its decoder looks at that. Rows share one encoded text.
* A vision–language model reads a prompt in which a run of image tokens stands for each image. The pass that holds these tokens needs
  the images; later ones do not. Two things follow, and the engine sees to both: all image tokens of a prompt go through in its first
  pass (`Images.start`), and positions are the model's own (M-RoPE counts an image in two dimensions, not token by token).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.utils.generic import ModelOutput

from patchscopes.core.errors import InputError


class _Uncached(DynamicCache):
    """Hands back the keys and values that it is given, and keeps none."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _NeverSet(dict):
    """EncoderDecoderCache notes here which blocks have cached the encoded text."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class DecoderCache(EncoderDecoderCache):
    """Caches the decoder's own keys and values. Those of the encoded text are computed by every pass, for the rows that run."""

    def __init__(self, config: Any):
        super().__init__(DynamicCache(config=config), _Uncached())
        self.is_updated = _NeverSet()

    @property
    def layers(self) -> list[Any]:
        """The decoder's own layers, one a block."""
        return self.self_attention_cache.layers

    @layers.setter
    def layers(self, layers: list[Any]) -> None:
        own = self.self_attention_cache.__class__.__new__(self.self_attention_cache.__class__)
        own.__dict__.update({**self.self_attention_cache.__dict__, "layers": layers})
        self.self_attention_cache = own


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text that an encoder–decoder has read: the encoder's states [1, pos, d], and the class of what it returned."""

    states: Tensor
    kind: type[ModelOutput]

    def inputs(self, rows: int) -> dict[str, Any]:
        """Arguments of a decoder pass of so many rows."""
        return {"encoder_outputs": self.kind(last_hidden_state=self.states.expand(rows, -1, -1))}


@dataclass(frozen=True, eq=False)
class Images:
    """A prompt with images.

    ids        [1, pos], each image a run of image tokens
    marks      ids that stand for images
    pixels     arguments that hold the images (pixel_values, image_grid_thw, …): images along axis 0
    per_token  arguments that say something of each token (token_type_ids, …), [1, pos]
    positions  the model's own, [1, pos], or [axis, 1, pos] where images have several
    """

    ids: Tensor
    marks: frozenset[int]
    pixels: dict[str, Tensor]
    per_token: dict[str, Tensor]
    positions: Tensor

    def are_in(self, ids: Tensor) -> Tensor:
        """Which ids stand for images."""
        return torch.isin(ids, torch.tensor(sorted(self.marks), device=ids.device))

    def start(self, ids: Tensor, position: int) -> int:
        """Where a pass over `ids` that is to begin at `position` or before may begin: behind all images, or at the start.

        Some models part image tokens from others only in a prompt's first pass (Gemma-3 lets those of an image see each other).
        """
        columns = self.are_in(ids).any(0).nonzero()[:, 0].tolist()
        return 0 if columns and position <= columns[-1] else position

    def inputs(self, ids: Tensor, offset: int, *, bypassed: bool) -> tuple[dict[str, Any], Tensor | None]:
        """Arguments of a pass over `ids`, and positions; ({}, None) if no row has images.

        bypassed: states are put in for what the embedding gives, so the images themselves are not needed. InputError if image tokens
        are not those of the prompt.
        """
        there = self.are_in(ids)
        rows = there.any(1)
        if not rows.any():
            return {}, None
        length = ids.shape[1]
        reach = int(there.any(0).nonzero().max()) + 1  # text behind the images may be any
        mine, missing = self.ids[:, offset : offset + reach], int(self.are_in(self.ids).sum()) - there[rows].sum(1)
        if mine.shape[1] != reach or (ids[rows, :reach] != mine).any() or missing.any():
            raise InputError(
                "a prompt has image tokens, but is not the prompt that the images were given for, or not all of its images run in one "
                "pass; expected the prompt of model.given(inputs), which may continue in other words after its last image"
            )
        extra: dict[str, Any] = {}
        for name, value in self.per_token.items():
            whole = torch.zeros(len(ids), length, dtype=value.dtype, device=ids.device)
            some = value[:, offset : offset + length]
            whole[rows, : some.shape[1]] = some
            extra[name] = whole
        if not bypassed:
            many = int(rows.sum())
            extra |= {name: value.repeat(many, *[1] * (value.ndim - 1)) for name, value in self.pixels.items()}
        own = self.positions[..., offset : offset + length]
        tail = torch.arange(length - own.shape[-1], device=ids.device) + self.next_position
        own = torch.cat([own, tail.expand(*own.shape[:-1], -1)], -1)
        text = torch.arange(offset, offset + length, device=ids.device).expand_as(own)
        return extra, torch.cat([own if has else text for has in rows.tolist()], -2)

    @property
    def next_position(self) -> int:
        """The position of the first token after the prompt."""
        return int(self.positions.max()) + 1


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What modules note about themselves inside (Qwen-2-VL: how far its positions are ahead of its tokens) is forgotten after.

    Attributes that are new stay: transformers marks with one that it has put on hooks of its own, which stay, too.
    """
    saved = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, state in saved:
            vars(module).update(state)


@torch.no_grad()
def own_positions(model: nn.Module, stack: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The positions that `model` gives to `stack`, the module of its blocks, for `inputs`; counted from 0 where it gives none."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        if isinstance(kwargs.get("position_ids"), Tensor):
            seen.append(kwargs["position_ids"].clone())

    with unchanged(model):
        handle = stack.register_forward_pre_hook(note, with_kwargs=True)
        try:
            model(**inputs, use_cache=False)
        finally:
            handle.remove()
    ids = inputs["input_ids"]
    return seen[-1] if seen else torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
