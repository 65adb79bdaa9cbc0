"""Repetition: few-shot copying of names, so that the model says again the words that the states stand for. Input inversion by the model.

    T = "name₁ -> name₁\\n … nameₖ -> nameₖ\\nx ->",   i* = x,   ℓ* = 0,   f = identity

The repeat prompt of Biran et al. 2024 ("Hopping Too Late", code) is "Syria: Syria, Leonardo DiCaprio: Leonardo DiCaprio, Samsung:
Samsung, x". A model that knows entity descriptions goes on with one behind a colon, so the shape of the token-identity prompt is taken,
and the arrow behind x is given. Where a source reads all states of a name (`Source(..., span="piece")`), they stand in as many places of
x: inversion from all tokens; else from one vector (Li et al. 2025, arXiv 2509.13316, inversions A and B). What comes out is what the text
alone would have told. ℓ* is 0 because the model has to read the name yet: on the bundled model names come back from deeper layers than with
ℓ* = 1 or ℓ* = ℓ (docs/inversion.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from patchscopes.core.layers import Layers
from patchscopes.core.names import SLOT
from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope

EXAMPLES = ("Syria", "Leonardo DiCaprio", "Samsung", "New York City")


def repeat(
    examples: Sequence[str] = EXAMPLES,
    *,
    arrow: str = " -> ",
    separator: str = "\n",
    layer: Layers = 0,
    map: Map | Sequence[Map] = Identity(),
    model: Model | None = None,
    max_new_tokens: int = 20,
) -> Patchscope:
    """The repeat scope; what it says ends at the separator."""
    prompt = "".join(f"{one}{arrow}{one}{separator}" for one in examples) + SLOT + arrow.rstrip()
    stop = (separator.rstrip(" ") or separator, "\n")
    return Patchscope(
        prompt, layer=layer, map=map, model=model, max_new_tokens=max_new_tokens, stop=tuple(dict.fromkeys(stop)), name="repeat"
    )
