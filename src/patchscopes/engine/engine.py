"""Run a Hugging Face decoder on token ids while reading and editing it.

Everything goes through the model's own `forward`, with explicit positions, without `output_hidden_states`, and with a tensor for
`logits_to_keep` (an int makes Gemma-4 slice the sequence inside). The user's model is left as it was found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from patchscopes.core.errors import InputError, RefusedError, SiteError
from patchscopes.core.sites import Site
from patchscopes.engine import measured
from patchscopes.engine.anatomy import Anatomy, Writer, find_anatomy
from patchscopes.engine.given import DecoderCache, Encoded, Images, own_positions
from patchscopes.engine.hooks import Change, Handle, all_of, bypassing, hooked, map_tensors, on_arguments, on_input, on_output
from patchscopes.engine.packing import Packing
from patchscopes.engine.parts import AllParts, find_parts
from patchscopes.engine.refuse import refuse_compiled
from patchscopes.engine.remember import Store

SharedKV = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Reading:
    """One unedited pass.

    h       layer -> residual stream [..., batch, pos, d_model], for the layers asked for
    shared  layer -> what that block finds handed over from earlier ones beside the hidden state: keys and values (Gemma-3n, Gemma-4),
            or what the one before returned ("rest 0", …; see Anatomy.carried); batch on axis 0. Mostly empty
    """

    h: dict[int, Tensor]
    shared: dict[int, SharedKV]
    logits: Tensor


class Engine:
    """A model and what is needed to run parts of it. Not re-entrant: one run at a time."""

    def __init__(self, model: nn.Module, device: torch.device | None = None):
        self.model: Any = model.eval()
        self.device = device or measured.execution_device(model)
        self.config: Any = model.config
        text_config = self.config.get_text_config(decoder=True)
        self.encodes = bool(getattr(self.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"))
        # what passes get beside their tokens; for an encoder–decoder a stand-in, until its parts and abilities are measured
        self.given: Encoded | Images | None = None
        if self.encodes:
            self.given = self.stand_in = self.encode(
                torch.arange(1, 8, device=self.device).remainder(text_config.vocab_size).unsqueeze(0)
            )
        self._injecting = False
        self.first_position = 0  # the number of a prompt's first position
        self.layout = (-3, -2)  # the axes of batch and position in a block's hidden state
        self.anatomy: Anatomy = find_anatomy(model, self.device, self.given.inputs(1) if self.given else {})
        self.blocks = self.anatomy.blocks
        self.n_layers = self.anatomy.n_layers
        self.first_position = measured.first_position(self)
        self.vocab: int = text_config.vocab_size
        # the longest sequence, in tokens; None if the config names no limit
        self.context: int | None = next(
            (
                int(n)
                for name in ("max_position_embeddings", "n_positions", "max_seq_len")
                if (n := getattr(text_config, name, None))
            ),
            None,
        )
        if self.context is not None:
            self.context -= self.first_position
        self.layout = measured.layout(self)
        self.anatomy = replace(self.anatomy, batch_axes=measured.batch_axes(self))
        some = self.read(torch.zeros(1, 1, dtype=torch.long, device=self.device), range(self.n_layers + 1)).h
        one = some[0]
        self.packing = Packing()  # what rows may share: nothing, until it was measured (`check`)
        self.one_base_pass: bool | None = (
            None  # whether a prefix's cache is part of the whole prompt's (patch.Stem), once it is known
        )
        self.store: Store | None = None  # base runs of targets, while they are remembered
        # what a residual carries in front of its batch (with `layout` undone): () but for Gemma-3n, DeepSeek-V4 and their like
        self.streams: tuple[int, ...] = tuple(one.shape[:-3])
        self.d_model: int = one.shape[-1]  # the residual's width: in Qwen-4 several times the config's hidden_size
        # how gradients flow through resumed runs (walk_gradients.route_of), once it is known
        self.gradient_route: Literal["stairs", "whole", "hooks"] | None = None
        # shapes of sites seen so far (places.shape_of)
        self.shapes: dict[Site, tuple[int, ...]] = {}
        # number formats of sites: Mamba keeps its residual stream in float32 whatever its weights are in
        self.dtypes: dict[Site, torch.dtype] = {Site("resid", layer): h.dtype for layer, h in some.items()}
        # of values inside state-space mixers the axes of batch and position, and the width (state_space.form_of)
        self.forms: dict[Site, tuple[tuple[int, int] | None, int]] = {}

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """Where parameters are."""
        return frozenset({self.device, *(p.device for p in self.model.parameters())})

    @cached_property
    def fuses(self) -> bool:
        """Whether attention over copies runs in one kernel that is as fast at every new length: float32 on CUDA (see `patch.COPIES`)."""
        return self.device.type == "cuda" and next(self.model.parameters()).dtype == torch.float32

    @cached_property
    def parts(self) -> AllParts:
        """What is inside the blocks, measured when it is first asked for."""
        ids = torch.arange(1, 9, device=self.device).remainder(self.vocab).unsqueeze(0)
        return find_parts(self.model, self.anatomy, lambda: self.forward(ids))

    @contextmanager
    def remembering(self, max_bytes: int = 2**30) -> Iterator[None]:
        """Inside, base runs of target prompts are kept for later calls, the latest `max_bytes` of them. Weights must stay as they are."""
        before, self.store = self.store, Store(max_bytes)
        try:
            yield
        finally:
            self.store = before

    # -------------------------------------------------------------------------------------------------------- forward

    def new_cache(self) -> Any:
        """An empty cache, or None if the model takes none. With the config: sliding and recurrent layers need their own class."""
        if self.encodes:
            return DecoderCache(self.model.get_decoder().config)
        return DynamicCache(config=self.config) if self.anatomy.cache_name else None

    def forward(
        self,
        ids: Int[Tensor, "batch pos"],
        *,
        offset: int = 0,
        cache: Any = None,
        keep: Sequence[int] | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch kept vocab"]:
        """Logits of one pass. `keep`: the positions of `ids` whose logits are wanted (None: all); `offset`: tokens in the cache."""
        refuse_compiled((self.model, *self.blocks))  # it may have been since it was loaded
        n, s = ids.shape
        names = ("decoder_input_ids", "decoder_attention_mask") if self.encodes else ("input_ids", "attention_mask")
        kwargs: dict[str, Any] = {names[0]: ids}
        given = self.stand_in if self.encodes and self._injecting and self.given is None else self.given
        if self.encodes and given is None:
            raise RefusedError(
                "this model is an encoder–decoder: its decoder needs a text to look at. Give it one: model.given(text=…) is a model "
                "whose prompts are the decoder's"
            )
        if isinstance(given, Encoded):
            kwargs |= given.inputs(n)
        where = torch.arange(offset, offset + s, device=ids.device).expand(n, -1) if positions is None else positions
        where = where + getattr(cache, "ahead", 0)  # after images positions are not the number of tokens (M-RoPE): by so much
        if isinstance(given, Images):
            extra, own = given.inputs(ids, offset, bypassed=self._injecting)
            if own is not None:
                if mask is not None:
                    raise InputError("prompts with images cannot be padded; expected one length, or one prompt at a time")
                where, kwargs = own, kwargs | extra
                if cache is not None:
                    cache.ahead = given.next_position - given.ids.shape[1]
        if self.anatomy.takes_positions:
            kwargs["position_ids"] = where + self.first_position
        if mask is not None:
            kwargs[names[1]] = mask
        if cache is not None and self.anatomy.cache_name is not None:
            kwargs[self.anatomy.cache_name] = cache
        if keep is not None and self.anatomy.takes_keep:
            kwargs["logits_to_keep"] = _indices(keep, ids.device)
        logits = self.model(use_cache=cache is not None, **kwargs).logits
        if keep is not None and not self.anatomy.takes_keep:
            logits = logits[:, list(keep)]
        return logits

    @torch.no_grad()
    def encode(self, ids: Int[Tensor, "1 pos"]) -> Encoded:
        """A text as the encoder reads it."""
        out = self.model.get_encoder()(input_ids=ids.to(self.device))
        return Encoded(out.last_hidden_state, type(out))

    def see(self, inputs: dict[str, Tensor], marks: frozenset[int]) -> Images:
        """A prompt with images, `inputs` being what the model's processor made of it. InputError if it has no image token."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        ids = inputs["input_ids"]
        if ids.shape[0] != 1 or not any((ids == mark).any() for mark in marks):
            raise InputError(
                f"expected one prompt with image tokens (ids {sorted(marks)}); found {ids.shape[0]} prompts, "
                f"with the ids {ids.unique().tolist()[:8]}, …"
            )
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        per_token = {name: value for name, value in rest.items() if value.shape == ids.shape and not value.is_floating_point()}
        stack = self.model.get_submodule(self.anatomy.blocks_path.rpartition(".")[0])
        plain = {name: value for name, value in inputs.items() if name != "attention_mask"}
        positions = own_positions(self.model, stack, plain)
        return Images(ids, marks, {name: value for name, value in rest.items() if name not in per_token}, per_token, positions)

    def with_given(self, given: Encoded | Images | None) -> Engine:
        """This engine, every pass of which also gets `given`."""
        other = copy.copy(self)
        other.given = given
        return other

    def start(self, ids: Int[Tensor, "target pos"], position: int) -> int:
        """Where a pass that is to begin at `position` or before may begin: all images of a prompt run in its first pass."""
        return self.given.start(ids, position) if isinstance(self.given, Images) else position

    @contextmanager
    def bypassing(self, upto: int, shared: SharedKV | None = None) -> Iterator[None]:
        """Blocks [0, upto) return their input inside, into which the caller puts states; `shared`: what they would have handed
        over, one row or as many as run."""
        shared, rest = shared or {}, self.anatomy.rest
        carried = {j: shared[f"rest {j}"][0] for j in range(len(rest or ())) if f"rest {j}" in shared}
        rest = None if rest is None else tuple(carried.get(j, value) for j, value in enumerate(rest))

        def fill(pool: dict, n: int) -> None:
            for name, pair in shared.items():
                if not _was_returned(name):
                    pool[name] = tuple(t if t.shape[0] == n else t.expand(n, *t.shape[1:]) for t in pair)

        before, self._injecting = self._injecting, True
        try:
            with bypassing(self.blocks[:upto], rest, fill):
                yield
        finally:
            self._injecting = before

    def joining(
        self, layer: int, old: int, fresh: SharedKV, joined: Callable[[str, tuple[Tensor, ...]], tuple[Tensor, ...]]
    ) -> Handle:
        """Hook that puts `fresh`, what newcomers at `layer` would have been handed over (see Reading.shared), behind that of the
        first `old` rows. `joined`: has the last word on keys and values."""
        carried = self.anatomy.carried[layer] if layer < self.n_layers else {}

        def behind(mine: Tensor, new: Tensor) -> Tensor:
            if not old:
                return new
            return torch.cat([mine[:old].expand(old, *mine.shape[1:]), new.to(mine.device)])

        def change(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            pool: SharedKV = kwargs.get("shared_kv_states", {})
            for name, tensors in fresh.items():
                if not _was_returned(name):
                    both = tuple(behind(m, f) for m, f in zip(pool.get(name, tensors), tensors, strict=True))
                    pool[name] = joined(name, both)

            def grow(path: tuple, t: Tensor) -> Tensor:
                name = f"rest {carried[path]}" if path in carried else ""
                return behind(t, fresh[name][0]) if name in fresh else t

            rest, named = map_tensors(grow, (args[1:], {k: v for k, v in kwargs.items() if k != "shared_kv_states"}))
            return (args[0], *rest), {**kwargs, **named}

        return on_arguments(self.blocks[layer], change)

    # ---------------------------------------------------------------------------------------------------------- sites

    def at_layer(self, layer: int, change: Change) -> Handle:
        """Hook that passes the residual stream at `layer`, 0…L, through `change`."""
        if self.layout != (-3, -2):
            change = self._in_order(change)
        if layer < self.n_layers:
            return on_input(self.blocks[layer], change)
        return on_output(self.blocks[-1], change)

    def rows_and_columns(self, x: Tensor) -> tuple[int, int]:
        """How many rows and positions a block's hidden state has."""
        return x.shape[self.layout[0]], x.shape[self.layout[1]]

    def _in_order(self, change: Change) -> Change:
        """`change`, which takes [..., batch, pos, d_model], for a model that has streams behind these axes (DeepSeek-V4)."""

        def moved(x: Tensor) -> Tensor | None:
            new = change(x.movedim(self.layout, (-3, -2)))
            return None if new is None else new.movedim((-3, -2), self.layout).contiguous()  # DeepSeek-V4 takes views of it

        return moved

    def writer(self, site: Site) -> Writer:
        """The module that writes `site` (attn_out.b, mlp_out.b). SiteError if block b has no such writer."""
        writers = self.anatomy.writers[site.index]
        last = 2 if self.encodes else 1  # attention to the encoded text stands between the two
        k = {"attn_out": 0, "mlp_out": last}[site.name]
        if not writers:
            raise SiteError(
                f"site {site} is not on this model: what block {site.index} adds to the residual stream is not a sum of module "
                "outputs that could be found. The residual stream itself (resid.*) can be read and written."
            )
        if k >= len(writers) > 1:
            raise SiteError(
                f"site {site} is not on this model: block {site.index} has {len(writers)} residual writers, "
                f"{', '.join(repr(w.path) for w in writers)}, and which of them is its MLP is not known"
            )
        if k >= len(writers):
            only = writers[0].path
            raise SiteError(
                f"site {site} is not on this model: block {site.index} has one residual writer, {only!r}, "
                f"which is called attn_out.{site.index} here"
            )
        return writers[k]

    def at_site(self, site: Site, change: Change) -> Handle:
        """Hook that passes the value of `site`, [..., batch, pos, d_model], through `change`.

        At attn_out and mlp_out this is what is added to the residual stream: a multiplier of the model's (Granite) is in it.
        """
        if site.name == "resid":
            return self.at_layer(site.index, change)
        writer = self.writer(site)
        shape: list[torch.Size] = []

        def scaled(out: Tensor) -> Tensor | None:
            value = out.reshape(shape[-1]) if shape and out.shape != shape[-1] else out  # OPT writes [batch · pos, d_model]
            new = change(value if writer.scale == 1 else value * writer.scale)
            if new is None:
                return None
            return (new if writer.scale == 1 else new / writer.scale).reshape(out.shape)

        block = on_arguments(self.blocks[site.index], lambda args, _kw: shape.append(args[0].shape))
        inner = on_output(writer.module, scaled)

        return all_of(block, inner)

    @torch.no_grad()
    def read(
        self,
        ids: Int[Tensor, "batch pos"],
        layers: Sequence[int],
        *,
        offset: int = 0,
        cache: Any = None,
        keep: Sequence[int] | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Reading:
        """The residual stream at `layers` in one pass."""
        h: dict[int, Tensor] = {}
        shared: dict[int, SharedKV] = {}

        def look(layer: int) -> list[Handle]:
            def note(args: tuple, kwargs: dict) -> None:
                shared[layer] = dict(kwargs.get("shared_kv_states") or {})

                def take(path: tuple, t: Tensor) -> Tensor:
                    if (j := self.anatomy.carried[layer].get(path)) is not None:
                        one = t.shape[0] == 1 < len(ids)  # the same for all rows
                        shared[layer][f"rest {j}"] = (t.expand(len(ids), *t.shape[1:]) if one else t,)
                    return t

                if self.anatomy.carried[layer]:
                    map_tensors(take, (args[1:], {k: v for k, v in kwargs.items() if k != "shared_kv_states"}))

            def keep_it(x: Tensor) -> None:
                h[layer] = x

            return [self.at_layer(layer, keep_it), *([on_arguments(self.blocks[layer], note)] if layer < self.n_layers else [])]

        with hooked(hook for layer in set(layers) for hook in look(layer)):
            logits = self.forward(ids, offset=offset, cache=cache, keep=keep, mask=mask, positions=positions)
        return Reading(h, shared, logits)

    @torch.no_grad()
    def unembed(self, h: Float[Tensor, "*stream row d_model"]) -> Float[Tensor, "row vocab"]:
        """Logits of any residuals: rows of one-token dummy prompts, every block bypassed, so that final norm, head, scale and
        soft-cap are the model's own."""
        with self.bypassing(self.n_layers), hooked([self.at_layer(0, lambda _x: h.unsqueeze(-2))]):
            return self.forward(torch.zeros(h.shape[-2], 1, dtype=torch.long, device=self.device))[:, 0]

    # --------------------------------------------------------------------------------------------------------- rows

    def narrowing(self, block: int, n: int) -> Handle:
        """Hook that gives `block` the first n rows of its other arguments (masks, positions, rotary tables, …)."""
        axes = self.anatomy.batch_axes or {}

        carried = self.anatomy.carried[block]  # these come from the block before, with as many rows as it ran

        def cut(path: tuple, t: Tensor) -> Tensor:
            axis, each = axes.get((block, *path), (None, 1)) if path not in carried else (None, 1)
            return t if axis is None else t.narrow(axis, 0, n * each)

        def change(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            rest, kwargs = map_tensors(cut, (args[1:], dict(kwargs)))
            return (args[0], *rest), kwargs

        return on_arguments(self.blocks[block], change)

    def own_logits(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """The model's logits when nothing but the tokens is said to it."""
        given = self.given.inputs(len(ids)) if isinstance(self.given, Encoded) else {}
        return self.model(**{"decoder_input_ids" if self.encodes else "input_ids": ids}, **given, use_cache=False).logits


def _indices(keep: Sequence[int], device: torch.device) -> Tensor:
    """As a tensor: a range is made where it is needed, since a GPU would be waited for if it were brought there."""
    first = keep[0] if keep else 0
    if list(keep) == list(range(first, first + len(keep))):
        return torch.arange(first, first + len(keep), device=device)
    return torch.tensor(list(keep), dtype=torch.long, device=device)


def _was_returned(name: object) -> bool:
    """Whether an entry of SharedKV is what the block before returned. Others have the model's own names, some of them numbers."""
    return isinstance(name, str) and name.startswith("rest ")
