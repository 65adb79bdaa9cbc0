"""SelfIE: the model interprets its own hidden states in a prompt that asks for a summary of a message; relevancy of each token.

T = "[INST] _ _ _ _ _ [/INST] Sure, I will summarize the message:", the same state in all five placeholders at ℓ* = 1, any ℓ, f = identity,
30 tokens (Chen, Vondrick and Mao 2024, arXiv 2403.10949). The **relevancy** of a token that it says is

    relevancy_j = |p(token_j | before, with the state) − p(token_j | before, without it)|,

teacher-forced on the same text: how much the token hangs on the state at all.

Published code differs: its mode "normalized" is plain replacement, the vector interface always writes layer 1 whatever it is given, the
"last layer" is normed, and insert positions come from tokenizing prefixes, which can be off by one. Here the placeholders are tokens found
by their offsets, ℓ* is what you say, and the last layer is raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError
from patchscopes.core.layers import Layers
from patchscopes.engine.score import Case, scores
from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model
from patchscopes.scopes.cells import Cell
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source
from patchscopes.scopes.viewing import Viewing

PLACEHOLDER = "_"  # what later tokens see of it below the target layer is part of the method
PLACEHOLDERS = 5
ANSWER = "Sure, I will summarize the message:"


def selfie(
    answer: str = ANSWER,
    *,
    placeholders: int = PLACEHOLDERS,
    layer: Layers = 1,
    map: Map | Sequence[Map] = Identity(),
    model: Model | None = None,
    max_new_tokens: int = 30,
    stop: Sequence[str] = (),
) -> Patchscope:
    """The SelfIE scope: the state at `placeholders` places of a user's turn, and the beginning of the model's answer."""
    if placeholders < 1:
        raise InputError(f"placeholders is {placeholders}; expected at least 1")
    prompt = f"[INST] {' '.join([PLACEHOLDER] * placeholders)} [/INST] {answer}"
    places = [f"{PLACEHOLDER}#{k + 1}" for k in range(placeholders)]
    return Patchscope(
        prompt, position=places, layer=layer, map=map, model=model, max_new_tokens=max_new_tokens, stop=stop, name="selfie"
    )


@dataclass(frozen=True, eq=False)
class Relevancy:
    """One reading, token by token.

    tokens     what was said
    with_      p of each token with the state in its places, the tokens before it given
    without    p of each without it
    """

    text: str
    tokens: tuple[str, ...]
    with_: Float[Tensor, " step"]
    without: Float[Tensor, " step"]
    source_layer: int
    target_layer: int

    @property
    def score(self) -> Float[Tensor, " step"]:
        """|with − without|, 0 to 1."""
        return (self.with_ - self.without).abs()


def relevancy(scope: Patchscope, source: Source | Sequence[Source]) -> list[Relevancy]:
    """The relevancy of every token that a scope says, cell by cell in the order of its readings. Any scope will do."""
    viewing = Viewing(scope, source, controls=False)
    model, cells = viewing.target_model, viewing.cells
    outcomes = viewing.read(cells)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    texts = [outcome.said for outcome in outcomes]
    cases: list[Case] = []
    for cell, text in zip(cells, texts, strict=True):
        ids = viewing.target_of(cell).tokens.ids
        for state in (viewing.written(cell), None):
            cases.append(Case(ids, viewing.row(cell, state), text, viewing.without(cell, state)))
    log_p = dict(scores(model.engine, cases, route=model.capabilities.readout_route, guidance=scope.guidance))
    return [
        _relevancy(viewing, cell, text, log_p[2 * k], log_p[2 * k + 1])
        for k, (cell, text) in enumerate(zip(cells, texts, strict=True))
    ]


def _relevancy(viewing: Viewing, cell: Cell, text: Sequence[int], with_: Tensor, without: Tensor) -> Relevancy:
    model = viewing.target_model
    shown = tuple(model.show(token) for token in text)
    return Relevancy(
        model.decode(text), shown, with_.double().exp(), without.double().exp(), cell.source_layer, cell.target_layer
    )
