"""Cross-model description: a larger model says who or what a state of a smaller one stands for.

The entity-description scope with M* another model and f a map between the two residual streams (Ghandeharioun et al. 2024, 4.4, tables 1
and 4). Where the widths differ a map is needed; `maps.fit(small, texts, [(ℓ, ℓ*)], target=large)` fits one, for each pair of layers. No
code for cross-model generation was published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from patchscopes.core.layers import Layers
from patchscopes.maps import Map
from patchscopes.model.model import Model
from patchscopes.scopes.describe import EXAMPLES, describe
from patchscopes.scopes.patchscope import Patchscope


def cross_model(
    model: Model,
    map: Map | Sequence[Map],
    examples: Mapping[str, str] = EXAMPLES,
    *,
    layer: Layers = "same",
    max_new_tokens: int = 20,
    stop: Sequence[str] = (),
) -> Patchscope:
    """The entity-description scope of `model`, for states of another one that `map` brings there."""
    built = describe(examples, layer=layer, map=map, model=model, max_new_tokens=max_new_tokens, stop=stop)
    return replace(built, name="cross-model")
