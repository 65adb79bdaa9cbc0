"""Sources: which hidden states to look at. (S, i, M, ℓ) of a Patchscope, every combination of the listed prompts, positions, layers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, PromptError
from patchscopes.core.layers import Layers, resolve_layers
from patchscopes.core.sites import SCOPED, Site, resolve_sites
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Position, Span, Tokens, as_tokens

TOKENS_AT_ONCE = 8192  # of one pass over source prompts, padding included


@dataclass(frozen=True, eq=False)
class Source:
    """Hidden states of `model` while it reads `prompt`.

    prompt    one prompt or several
    position  an index, a piece of text ("Wales": the last token of its only occurrence), a list of these, or "all"
    layer     a layer, a list or range of them, or "all"; for the sites attn_out and mlp_out the index of a block
    site      "resid", "attn_out" or "mlp_out"
    span      how many tokens, up to the position, have their states taken together, to be written in as many places; "piece": those
              that the piece of text (or the `Span`) touches
    """

    model: Model
    prompt: Prompt | Sequence[Prompt]
    position: Position | Sequence[Position] = -1
    layer: Layers = "all"
    site: str = "resid"
    _vectors: Tensor | None = field(default=None, repr=False)
    _labels: tuple[str, ...] = field(default=(), repr=False)
    span: int | Literal["piece"] = 1

    @classmethod
    def of_vectors(
        cls, model: Model, vectors: Float[Tensor, "*row d_model"], *, layer: int, labels: Sequence[str] = (), site: str = "resid"
    ) -> Source:
        """Vectors from anywhere (a difference of means, a direction, a file), looked at as if they stood at `layer` of `model`.

        They have no prompt: no second look is possible, so their readings carry controls but no evidence.
        """
        rows = model.vector(torch.atleast_2d(vectors).detach())
        if labels and len(labels) != len(rows):
            raise InputError(f"{len(labels)} labels were given for {len(rows)} vectors; expected one each")
        names = tuple(labels) or tuple(f"vector {i}" for i in range(len(rows)))
        return cls(model, names, -1, layer, site, rows, names)

    def layers(self) -> list[int]:
        """The layers (or blocks) read, resolved."""
        if self.site not in SCOPED:
            resolve_sites(f"{self.site}.0", self.model.n_layers)  # says what is known
        return resolve_layers(self.layer, self.model.n_layers - (self.site != "resid"))

    def places(self) -> list[Place]:
        """The prompts' positions, resolved."""
        if self._vectors is not None:
            return [Place(i, label, None, 0, self._vectors[i]) for i, label in enumerate(self._labels)]
        prompts = [self.prompt] if isinstance(self.prompt, (str, Tokens)) else list(self.prompt)
        if not prompts:
            raise PromptError("the source has no prompt; expected at least one")
        found = []
        for i, prompt in enumerate(prompts):
            tokens = self.model.tokens(prompt)
            if self.position == "all":
                asked: list[Position] = list(range(len(tokens)))
            else:
                asked = [self.position] if isinstance(self.position, (int, str, Span)) else list(self.position)
            for p in asked:
                last = tokens.position(p)
                found.append(Place(i, tokens.text, tokens, last, span=self._span(tokens, p, last)))
        return found

    def _span(self, tokens: Tokens, where: Position, last: int) -> int:
        """How many tokens up to `last` are read together."""
        if self.span == "piece":
            return last - tokens.first(where) + 1
        if not 1 <= self.span <= last + 1:
            raise InputError(
                f"span is {self.span}; expected 1 to {last + 1}, the tokens of {tokens.text!r} up to position {last}, or 'piece'"
            )
        return self.span


@dataclass(frozen=True, eq=False)
class Place:
    """A position of a prompt, with the `span` tokens that end there; or a vector without one (tokens is None)."""

    prompt: int
    text: str
    tokens: Tokens | None
    position: int
    vector: Tensor | None = None
    span: int = 1

    @cached_property
    def digest(self) -> str:
        """A hash of what is read: token ids and position, or the vector."""
        if self.tokens is not None:
            where = (self.tokens.ids, self.position) if self.span == 1 else (self.tokens.ids, self.position, self.span)
            content = repr(where).encode()
        else:
            assert self.vector is not None
            content = self.vector.detach().double().cpu().contiguous().numpy().tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    @property
    def token(self) -> str:
        """The token (or tokens) that stand there, as they are shown."""
        return self.text if self.tokens is None else "".join(self.tokens.strings[p] for p in self.positions)

    @property
    def positions(self) -> range:
        """Of the tokens that are read together."""
        return range(self.position - self.span + 1, self.position + 1)


@dataclass(frozen=True, eq=False)
class Looked:
    """vectors[place, layer] of the residual stream or another site, of the tokens that end there; next_log_p: what the source model
    would say next, nats."""

    vectors: dict[tuple[int, int], Float[Tensor, "span *stream d_model"]]
    next_log_p: list[Float[Tensor, " vocab"] | None]


def look(
    model: Model, places: Sequence[Place], layers: Sequence[int], site: str, *, behind: str | None = None, reach: int = 1
) -> Looked:
    """The states at `places` and `layers`, each prompt run once; at each place those of `reach` tokens, or of as many as there are.

    behind: a text put in front of every prompt, token by token, so that the prompt's own tokens stay the same (the second look).
    """
    vectors: dict[tuple[int, int], Tensor] = {}
    next_log_p: list[Tensor | None] = [None] * len(places)
    prompts: dict[tuple[int, ...], list[int]] = {}
    moved_by: dict[tuple[int, ...], tuple[int, int]] = {}
    for k, place in enumerate(places):
        if place.tokens is None:
            if place.vector is not None and behind is None:
                vectors.update({(k, layer): place.vector[None] for layer in layers})
            continue
        ids, lead, moved = _behind(model, place.tokens, behind)
        moved_by[ids] = (lead, moved)
        prompts.setdefault(ids, []).append(k)
    sites = [str(Site(site, layer)) for layer in layers]
    queue = sorted(prompts, key=len)
    while queue:
        size = max(1, TOKENS_AT_ONCE // len(queue[-1]))
        batch, queue = queue[-size:], queue[:-size]
        run = model.run([as_tokens(ids) for ids in batch], read=sites)
        for row, ids in enumerate(batch):
            real = run.mask[row].nonzero()[:, 0].tolist()
            lead, moved = moved_by[ids]
            for k in prompts[ids]:
                last = places[k].position
                columns = [real[p + (moved if p >= lead else 0)] for p in range(max(0, last + 1 - reach), last + 1)]
                next_log_p[k] = run.logits[row, columns[-1]].float().log_softmax(-1).cpu()
                for layer, name in zip(layers, sites, strict=True):
                    vectors[k, layer] = run[name][..., row, columns, :].movedim(-2, 0).contiguous()
    return Looked(vectors, next_log_p)


def _behind(model: Model, tokens: Tokens, prefix: str | None) -> tuple[tuple[int, ...], int, int]:
    """Ids of the prompt behind `prefix`; how many special tokens stay in front (BOS); by how much the others move."""
    if prefix is None:
        return tokens.ids, 0, 0
    lead = 0
    while lead < len(tokens) and tokens.special[lead]:
        lead += 1
    words = model.tokenizer(prefix, add_special_tokens=False)["input_ids"]
    room = len(words) if model.context is None else min(len(words), model.context - len(tokens))
    words = words[len(words) - max(room, 0) :]
    return (*tokens.ids[:lead], *words, *tokens.ids[lead:]), lead, len(words)
