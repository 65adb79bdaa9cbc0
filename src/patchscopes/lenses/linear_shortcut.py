"""Linear shortcut: from layer ℓ straight into layer L by an affine map fitted by least squares, then the model's own final norm and head.

    lens_ℓ(h) = unembed(W_ℓ h + b_ℓ),   W_ℓ, b_ℓ = argmin Σ ‖h_L − W h_ℓ − b‖²

Din et al. 2023, "Jump to Conclusions: Short-Cutting Transformers With Linear Transformations"; it is also what Ghandeharioun et al. 2024
(4.1) call "tuned lens". It has a closed form, so it is fitted in one pass over the text; the tuned lens, which asks that the
*distributions* agree, needs training. h_L is the raw last layer, so that the final norm comes once.
"""

from __future__ import annotations

from dataclasses import replace

from patchscopes.core.errors import InputError
from patchscopes.maps import Fitted, Map
from patchscopes.model.model import Model
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope


def linear_shortcut(fitted: Fitted | Map, *, model: Model | None = None) -> Patchscope:
    """The scope of `maps.fit(model, texts, "last")`: ℓ* = L, f = what was fitted, one token."""
    f = fitted.map if isinstance(fitted, Fitted) else fitted
    if isinstance(fitted, Fitted) and len({to for _, to in fitted.map.maps}) != 1:
        raise InputError('the maps go into several layers; expected those of maps.fit(model, texts, "last"), all into L')
    return replace(logit_lens(map=f, model=model), name="linear-shortcut")
