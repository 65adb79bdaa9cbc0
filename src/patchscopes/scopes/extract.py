"""Zero-shot feature extraction: a relation put into words with x in the entity's place; the model completes it.

T = "The capital of x is", i* = x, ℓ* any, f = identity (Ghandeharioun et al. 2024, 4.2, tables 1 and 4). The paper's prompts end in x,
so that i* is the last token; here x may stand anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchscopes.core.layers import Layers
from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope


def extract(
    template: str,
    *,
    layer: Layers = "same",
    map: Map | Sequence[Map] = Identity(),
    model: Model | None = None,
    max_new_tokens: int = 10,
    stop: Sequence[str] = (),
) -> Patchscope:
    """The feature-extraction scope of one relation: extract("The capital of {x} is"). 10 tokens, as in the published code."""
    return Patchscope(template, layer=layer, map=map, model=model, max_new_tokens=max_new_tokens, stop=stop, name="extract")
