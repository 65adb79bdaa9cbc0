"""Run a Hugging Face decoder on token ids while reading and editing it.

Everything goes through the model's own `forward`, with explicit positions, without `output_hidden_states`, and with a tensor for
`logits_to_keep` (an int makes Gemma-4 slice the sequence inside). The user's model is left as it was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from patchscopes.core.errors import SiteError
from patchscopes.core.sites import Site
from patchscopes.engine.anatomy import Anatomy, Writer, find_anatomy, measure_batch_axes
from patchscopes.engine.hooks import Change, Handle, bypassing, hooked, map_tensors, on_arguments, on_input, on_output
from patchscopes.engine.packing import Packing
from patchscopes.engine.remember import Store

SharedKV = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Reading:
    """One unedited pass.

    h       layer -> residual stream [..., batch, pos, d_model], for the layers asked for
    shared  layer -> the keys and values that block finds handed over from earlier ones (Gemma-3n, Gemma-4; else empty)
    """

    h: dict[int, Tensor]
    shared: dict[int, SharedKV]
    logits: Tensor


class Engine:
    """A model and what is needed to run parts of it. Not re-entrant: one run at a time."""

    def __init__(self, model: nn.Module, device: torch.device | None = None):
        self.model: Any = model.eval()
        self.device = device or _execution_device(model)
        self.anatomy: Anatomy = find_anatomy(model, self.device)
        self.blocks = self.anatomy.blocks
        self.n_layers = self.anatomy.n_layers
        self.config: Any = model.config
        text_config = self.config.get_text_config(decoder=True)
        self.vocab: int = text_config.vocab_size
        self.width: int = text_config.hidden_size  # d_model
        # the longest sequence, in tokens; None if the config names no limit
        self.context: int | None = next(
            (
                int(n)
                for name in ("max_position_embeddings", "n_positions", "max_seq_len")
                if (n := getattr(text_config, name, None))
            ),
            None,
        )
        self.anatomy = replace(self.anatomy, batch_axes=self._measure_batch_axes())
        one = self.read(torch.zeros(1, 1, dtype=torch.long, device=self.device), [0]).h[0]
        self.packing = Packing()  # what rows may share: nothing, until it was measured (`check`)
        self.store: Store | None = None  # base runs of targets, while they are remembered
        # what a residual carries in front of its batch: () but for Gemma-3n
        self.streams: tuple[int, ...] = tuple(one.shape[:-3])

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
        n, s = ids.shape
        kwargs: dict[str, Any] = {}
        if positions is None:
            positions = torch.arange(offset, offset + s, device=ids.device).expand(n, -1)
        if self.anatomy.takes_positions:
            kwargs["position_ids"] = positions
        if mask is not None:
            kwargs["attention_mask"] = mask
        if cache is not None and self.anatomy.cache_name is not None:
            kwargs[self.anatomy.cache_name] = cache
        if keep is not None and self.anatomy.takes_keep:
            kwargs["logits_to_keep"] = torch.tensor(list(keep), device=ids.device)
        logits = self.model(ids, use_cache=cache is not None, **kwargs).logits
        if keep is not None and not self.anatomy.takes_keep:
            logits = logits[:, list(keep)]
        return logits

    @contextmanager
    def bypassing(self, upto: int, shared: SharedKV | None = None) -> Iterator[None]:
        """Blocks [0, upto) return their input inside; `shared`: what they would have handed over, one row or as many as run."""

        def fill(pool: dict, n: int) -> None:
            for name, pair in (shared or {}).items():
                pool[name] = tuple(t if t.shape[0] == n else t.expand(n, *t.shape[1:]) for t in pair)

        with bypassing(self.blocks[:upto], self.anatomy.rest, fill):
            yield

    # ---------------------------------------------------------------------------------------------------------- sites

    def at_layer(self, layer: int, change: Change) -> Handle:
        """Hook that passes the residual stream at `layer`, 0…L, through `change`."""
        if layer < self.n_layers:
            return on_input(self.blocks[layer], change)
        return on_output(self.blocks[-1], change)

    def writer(self, site: Site) -> Writer:
        """The module that writes `site` (attn_out.b, mlp_out.b). SiteError if block b has no such writer."""
        writers = self.anatomy.writers[site.index]
        k = {"attn_out": 0, "mlp_out": 1}[site.name]
        if not writers:
            raise SiteError(
                f"site {site} is not on this model: what block {site.index} adds to the residual stream is not a sum of module "
                "outputs that could be found. The residual stream itself (resid.*) can be read and written."
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

        def put() -> Any:
            block.put()
            inner.put()
            return _Both(block, inner)

        return Handle(put)

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

        def cut(path: tuple, t: Tensor) -> Tensor:
            axis, each = axes.get((block, *path), (None, 1))
            return t if axis is None else t.narrow(axis, 0, n * each)

        def change(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            rest, kwargs = map_tensors(cut, (args[1:], dict(kwargs)))
            return (args[0], *rest), kwargs

        return on_arguments(self.blocks[block], change)

    def _measure_batch_axes(self) -> dict[tuple, tuple[int, int]] | None:
        for prefix in (2, 0):  # Mamba-1 refuses a mask longer than the chunk
            try:
                return measure_batch_axes({n: self._argument_shapes(n, prefix) for n in (2, 3)})
            except (RuntimeError, ValueError, TypeError, IndexError):  # a model may object in its own way; then without a prefix
                continue
        return None

    @torch.no_grad()
    def _argument_shapes(self, n: int, prefix: int) -> dict[tuple, torch.Size]:
        """Shapes of all tensors that blocks get beside the hidden state, for n rows with a prefix and a padded row: masks that are
        not needed are left out by the library, and would not be seen."""
        shapes: dict[tuple, torch.Size] = {}

        def note(block: int) -> Handle:
            def look(args: tuple, kwargs: dict) -> None:
                def put(path: tuple, t: Tensor) -> Tensor:
                    shapes[block, *path] = t.shape
                    return t

                map_tensors(put, (args[1:], dict(kwargs)))

            return on_arguments(self.blocks[block], look)

        ids = torch.arange(1, 6, device=self.device).remainder(self.vocab).repeat(n, 1)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        cache = self.new_cache() if prefix else None
        if cache is not None:
            self.forward(ids[:, :prefix], cache=cache, mask=mask[:, :prefix])
        with hooked(note(b) for b in range(self.n_layers)):
            self.forward(ids[:, prefix:], offset=prefix, cache=cache, mask=mask)
        return shapes


@dataclass
class _Both:
    first: Handle
    second: Handle

    def remove(self) -> None:
        self.first.remove()
        self.second.remove()


def _execution_device(model: nn.Module) -> torch.device:
    """Where inputs go: accelerate's hook on the model knows it when parameters are offloaded ("meta")."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    device = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), None)
    if device is not None:
        return torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    return next(p.device for p in model.parameters())
