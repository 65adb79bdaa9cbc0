"""Entity description: few-shot descriptions, so that the model says who or what the state stands for.

T = "subj₁: desc₁, …, subjₖ: descₖ, x", i* = the last token (x), ℓ* = ℓ, f = identity (Ghandeharioun et al. 2024, 4.3, tables 1 and 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchscopes.core.layers import Layers
from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope

EXAMPLES = {
    "Syria": "Country in the Middle East",
    "Leonardo DiCaprio": "American actor",
    "Samsung": "South Korean multinational major appliance and consumer electronics corporation",
}


def describe(
    examples: Mapping[str, str] = EXAMPLES,
    *,
    layer: Layers = "same",
    map: Map | Sequence[Map] = Identity(),
    model: Model | None = None,
    max_new_tokens: int = 20,
    stop: Sequence[str] = (),
) -> Patchscope:
    """The entity-description scope with k = len(examples) demonstrations; three as in the paper. stop=(",",) ends at the next entity."""
    shown = "".join(f"{name}: {description}, " for name, description in examples.items())
    return Patchscope(shown + "{x}", layer=layer, map=map, model=model, max_new_tokens=max_new_tokens, stop=stop, name="describe")
