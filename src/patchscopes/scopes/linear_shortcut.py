"""Linear shortcut: what the model would say if a map took the state to the last layer, past the blocks between.

ℓ* = L*, T any, f a linear or affine map from ℓ to L (Din et al. 2023, "Jump to Conclusions"; Ghandeharioun et al. 2024, tables 1 and 4,
where the tuned lens is the same configuration with a map fitted otherwise). `maps.fit(model, texts, [(ℓ, -1)])` fits one by least squares
to raw last states, so that the model's own final norm comes after the map, once; the published baseline is fitted to normed states and
normed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patchscopes.maps import Map
from patchscopes.model.model import Model
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope


def linear_shortcut(map: Map | Sequence[Map], *, model: Model | None = None) -> Patchscope:
    """The logit lens behind a map to the last layer."""
    return replace(logit_lens(map=map, model=model), name="linear-shortcut")
