"""Logit lens: what the model would say next if the state were its last one.

ℓ* = L*, f = identity, T any: a state written at the last layer of the last position goes through the final norm and the head alone
(nostalgebraist 2020; Ghandeharioun et al. 2024, tables 1 and 4).
"""

from __future__ import annotations

from collections.abc import Sequence

from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope


def logit_lens(*, map: Map | Sequence[Map] = Identity(), model: Model | None = None) -> Patchscope:
    """The logit lens as a scope: one token."""
    return Patchscope("{x}", layer=-1, map=map, model=model, max_new_tokens=1, name="logit-lens")
