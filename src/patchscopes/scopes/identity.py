"""Token identity: few-shot copying, so that the model says which token the state stands for, or what comes next.

T = "tok₁ -> tok₁\\n … tokₖ -> tokₖ\\n?", i* = the last token, ℓ* = ℓ, f = identity (Ghandeharioun et al. 2024, 4.1, tables 1 and 4).
With no examples T is the bare "?".
"""

from __future__ import annotations

from collections.abc import Sequence

from patchscopes.core.layers import Layers
from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope

EXAMPLES = ("cat", "1135", "hello")  # the prompt of the published code; figure 1 of the paper prints another separator


def identity(
    examples: Sequence[str] = EXAMPLES,
    *,
    layer: Layers = "same",
    map: Map | Sequence[Map] = Identity(),
    model: Model | None = None,
    max_new_tokens: int = 1,
) -> Patchscope:
    """The token-identity scope: one token, as in the paper. examples=() is the bare "?" variant, which often beats it."""
    prompt = "".join(f"{example} -> {example}\n" for example in examples) + "?"
    return Patchscope(prompt, position=-1, layer=layer, map=map, model=model, max_new_tokens=max_new_tokens, name="identity")
