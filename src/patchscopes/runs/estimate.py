"""What a sweep will take, before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from patchscopes.engine.shape import Shape, measure
from patchscopes.model.model import Model
from patchscopes.model.outline import Outline
from patchscopes.runs.cost import Costs
from patchscopes.runs.plan import Seen


def costs_of(seen: Sequence[Seen]) -> list[Costs]:
    """What the cells of each look cost."""
    shapes: dict[int, Shape] = {}

    def shape(model: Model) -> Shape:
        if id(model) not in shapes:
            shapes[id(model)] = model.shape if isinstance(model, Outline) else measure(model.engine)
        return shapes[id(model)]

    return [Costs(one.viewing, shape(one.viewing.origin), shape(one.viewing.target_model)) for one in seen]
