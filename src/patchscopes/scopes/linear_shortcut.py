"""Linear shortcut: from layer ℓ straight into layer L by an affine map fitted by least squares, past the blocks between.

    lens_ℓ(h) = unembed(W_ℓ h + b_ℓ),   W_ℓ, b_ℓ = argmin Σ ‖h_L − W h_ℓ − b‖²

ℓ* = L*, T any (Din et al. 2023, "Jump to Conclusions: Short-Cutting Transformers With Linear Transformations"; Ghandeharioun et al.
2024, tables 1 and 4, where the tuned lens is the same configuration; what 4.1 calls so is this one). It has a closed form, so `maps.fit`
makes it in one pass over the text; the tuned lens of `lenses`, which asks that the *distributions* agree, needs training. h_L is the raw
last state, so that the model's own final norm comes after the map, once; the published baseline is fitted to normed states and normed
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patchscopes.core.errors import InputError
from patchscopes.maps import ByLayer, Fitted, Map
from patchscopes.model.model import Model
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope


def linear_shortcut(map: Fitted | Map | Sequence[Map], *, model: Model | None = None) -> Patchscope:
    """The logit lens behind a map to the last layer: what `maps.fit(model, texts, "last")` gives, or a map, or several. InputError if what
    was fitted goes into several layers."""
    f = map.map if isinstance(map, Fitted) else map
    for one in [f] if callable(f) else f:
        if isinstance(one, ByLayer) and len(into := sorted({to for _, to in one.maps})) != 1:
            raise InputError(
                f"the map {one.name!r} goes into several layers, {', '.join(f'{k}' for k in into)}; expected one into L alone, as that of "
                'maps.fit(model, texts, "last")'
            )
    return replace(logit_lens(map=f, model=model), name="linear-shortcut")
