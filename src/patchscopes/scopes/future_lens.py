"""Future lens: which tokens, beyond the next one, a state already holds.

Pal et al. 2023, "Future Lens: Anticipating Subsequent Tokens from a Single Hidden State"; Ghandeharioun et al. 2024, tables 1 and 4. From
the state at layer ℓ and position t, what comes at t + 1, t + 2, … Three ways:

    fixed prompt   T asks for what is to come, i* = its last token, ℓ* = ℓ, f = identity: `future_lens`
    linear         a map from ℓ at t to the last layer at t + N, read through the head, which says what comes at t + N + 1:
                   `linear_shortcut(maps.fit(model, texts, "last", ahead=N))`
    soft prompt    T is ten learned embeddings, i* = the last of them, ℓ* = ℓ: `lenses.train_soft_prompt`

The paper's four fixed prompts are `FUTURE_PROMPTS`; the readings of all of them are one call, with `target` in the table.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchscopes.core.layers import Layers
from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope

FUTURE_PROMPTS = (
    'Hello! Could you please tell me more about "',
    'The multi-tokens present here are "',
    "The concepts in this hidden state listed are: (",
    "<|endoftext|> This state is describing about the following concept:",
)


def future_lens(
    prompt: str | Sequence[str] = FUTURE_PROMPTS[0],
    *,
    layer: Layers = "same",
    map: Map | Sequence[Map] = Identity(),
    model: Model | None = None,
    max_new_tokens: int = 4,
) -> Patchscope:
    """The future lens with a fixed prompt, patched at its last token."""
    return Patchscope(prompt, position=-1, layer=layer, map=map, model=model, max_new_tokens=max_new_tokens, name="future-lens")
