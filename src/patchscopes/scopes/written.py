"""Written runs: a prompt in which one given state is written, that of a scope or one of one's own, what it says and how likely a text is.

What a scope would say had the state been another, and what the model itself would do had it: both are runs of a prompt in which one state
is written, so that texts and the log p of texts come from one engine. Nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, PositionError, PromptError
from patchscopes.core.finite import require_finite
from patchscopes.core.sites import Site
from patchscopes.engine.continued import stopping
from patchscopes.engine.generate import Decoding, Request, stream
from patchscopes.engine.rows import Row
from patchscopes.engine.score import Case, scores
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Tokens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Place, Source
from patchscopes.scopes.viewing import Viewing


@dataclass(frozen=True, eq=False)
class Written:
    """A run of `model` over `prompt`, in which a state is written."""

    model: Model
    prompt: Tokens
    request: Request


@dataclass(frozen=True, eq=False)
class OneEach:
    """Sources under a scope that reads each of them once. states: what stands there, one a place."""

    viewing: Viewing
    states: Float[Tensor, "place *stream d_model"]

    @property
    def places(self) -> list[Place]:
        """Where the states were read."""
        return self.viewing.places

    @property
    def layer(self) -> int:
        """ℓ."""
        return self.viewing.layers[0]

    def scope(self, place: int, state: Float[Tensor, "*stream d_model"]) -> Written:
        """The scope's run of a place, with `state` instead of the place's own."""
        viewing, cell = self.viewing, self.viewing.cells[place]
        tokens, mapped = viewing.target_of(cell).tokens, viewing.mapped(cell, state[None, None])
        return Written(
            viewing.target_model,
            tokens,
            Request(tokens.ids, viewing.row(cell, mapped), without=viewing.without(cell, mapped)),
        )

    def source(self, place: int, more: str, state: Float[Tensor, "*stream d_model"] | None) -> Written:
        """The source model's own run of a place's prompt and `more` behind it, with `state` where the place was read; None: as it is.
        PositionError if the text behind it changes the tokens up to there."""
        viewing, one = self.viewing, self.places[place]
        if one.tokens is None:
            raise InputError(
                f"{one.text!r} is a vector without a prompt, so no prompt goes on from it; expected sources with prompts"
            )
        tokens = viewing.origin.tokens(one.tokens.text + more)
        if tokens.ids[: one.position + 1] != one.tokens.ids[: one.position + 1]:
            raise PositionError(
                f"with {more!r} behind it, {one.tokens.text!r} has other tokens up to position {one.position}; begin the text with a space "
                "or a full stop"
            )
        site = Site(viewing.site, self.layer)
        row = Row(site, one.position if state is not None else len(tokens) - 1, state)
        return Written(viewing.origin, tokens, Request(tokens.ids, row))


def one_each(scope: Patchscope, source: Source | Sequence[Source]) -> OneEach:
    """The states that `scope` reads. InputError unless there is one reading a place: one layer, target prompt, map; and a greedy one."""
    viewing = Viewing(scope, source, controls=False)
    if scope.temperature or len(viewing.cells) != len(viewing.places) or viewing.reach > 1 or len(viewing.read_layers) > 1:
        raise InputError(
            f"a measure is of one greedy reading of one token a source; found {len(viewing.cells)} readings of {len(viewing.places)} "
            f"places, {viewing.reach} tokens together, layers {viewing.read_layers}, temperature {scope.temperature:g}. Give one layer of "
            'source and scope, one target prompt and one map, span=1 and carry="one"'
        )
    viewing.sight.need(range(len(viewing.places)))
    states = [viewing.sight.vector(cell.place, cell.source_layer) for cell in viewing.cells]
    for place, state in zip(viewing.places, states, strict=True):
        require_finite(state, f"the state at layer {viewing.layers[0]}, position {place.position} of {place.text!r}")
    return OneEach(viewing, torch.stack(states))


def texts(runs: Sequence[Written], scope: Patchscope) -> list[str]:
    """What each run says, as long and up to where `scope` would. All runs are of one model."""
    if not runs:
        return []
    model = runs[0].model
    longest = max(len(run.prompt) for run in runs)
    if model.context is not None and longest + scope.max_new_tokens > model.context:
        raise PromptError(
            f"a prompt has {longest} tokens and {scope.max_new_tokens} more were asked for, but {model.name} reads at most {model.context}"
        )
    guidance = scope.guidance if any(run.request.without is not None for run in runs) else 0.0
    decoding = Decoding(scope.max_new_tokens, model.end_ids, stopping(model.decode, scope.stop), 0.0, guidance)
    route = model.capabilities.route if scope.max_new_tokens > 1 else model.capabilities.readout_route
    said = dict(stream(model.engine, [run.request for run in runs], decoding, route=route))
    return [model.decode(said[k].tokens) for k in range(len(runs))]


def log_p(runs: Sequence[Written], behind: Sequence[str], scope: Patchscope) -> list[float]:
    """log p (nats) of the text `behind[k]` after run k, all its tokens together. All runs are of one model."""
    if not runs:
        return []
    model = runs[0].model
    guidance = scope.guidance if any(run.request.without is not None for run in runs) else 0.0
    cases = [
        Case(run.prompt.ids, run.request.row, follow(model, run.prompt, text), run.request.without)
        for run, text in zip(runs, behind, strict=True)
    ]
    found = dict(scores(model.engine, cases, route=model.capabilities.readout_route, guidance=guidance))
    return [float(found[k].double().sum()) for k in range(len(cases))]


def plainly(model: Model, prompt: Prompt) -> Written:
    """The model's own run of a prompt, in which nothing is written."""
    tokens = model.tokens(prompt)
    return Written(model, tokens, Request(tokens.ids, Row(Site("resid", 0), len(tokens) - 1, None)))


def follow(model: Model, prompt: Tokens, text: str) -> tuple[int, ...]:
    """The tokens of `text` behind a prompt: those of both together where they begin with the prompt's. Where the tokenizer loses the space
    in front of what was said, it is put back between two words. InputError if there are none."""
    if prompt.text[-1:].isalnum() and text[:1].isalnum() and not model.decode(_alone(model, " a")).startswith(" "):
        text = f" {text}"
    both, n = model.tokens(prompt.text + text).ids, len(prompt)
    ids = both[n:] if both[:n] == prompt.ids else _alone(model, text)
    if not ids:
        raise InputError(f"there is no token in the text {text!r}, so it has no log p; expected some words")
    return ids


def _alone(model: Model, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
