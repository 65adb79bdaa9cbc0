"""Attribute lens: which object a relation gives the entity that a state stands for, if the relation is a linear map.

    D(h) = softmax(head(norm(β W h + b)))

Hernandez et al. 2024, "Linearity of Relation Decoding in Transformer Language Models": W is the mean Jacobian of a relation's object
state at layer L with respect to its subject state at layer ℓ, over some examples, b what is left over, β a scale. In the taxonomy of
Ghandeharioun et al. 2024 (tables 1 and 4): ℓ* = L*, T = S, f linear with extra variables; what is written at the last layer of the
position that is read depends on nothing else of T. `lenses.relation_map` makes W and b; any map from ℓ to L may take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patchscopes.maps import Map
from patchscopes.model.model import Model
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope


def attribute_lens(map: Map | Sequence[Map], *, model: Model | None = None) -> Patchscope:
    """The attribute lens of one relation, or of several: a map for each, which the table's column `map` tells apart."""
    return replace(logit_lens(map=map, model=model), name="attribute-lens")
