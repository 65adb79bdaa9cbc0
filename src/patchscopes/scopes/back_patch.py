"""Back-patching: write what a prompt's state became later back at an earlier layer of the same prompt, and let the model go on.

T = S, f = identity: while M reads S again, the residual stream at layer ℓ* and position i* is replaced by h, the state at layer ℓ and
position i of the first reading; i* = i unless another position is given (Biran et al. 2024, "Hopping Too Late: Exploring the
Limitations of Large Language Models on Multi-Hop Queries", section 6). Where ℓ > ℓ* blocks ℓ* … ℓ−1 work on the state a second time:
a fact found too late in the stack can still be used by them. ℓ = ℓ* changes nothing, ℓ < ℓ* skips blocks.

The paper tries all L(L−1)/2 pairs ℓ > ℓ* (1 ≤ ℓ* < ℓ ≤ L), and counts a question as corrected if one of them gives the answer: among so
many tries some succeed by chance. `back` keeps the paper's pairs, `forward` has as many that point the other way; the controls of a
Patchscope (a random vector, another prompt's) make as many tries, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from patchscopes.core.layers import Layers
from patchscopes.model.tokens import Position
from patchscopes.scopes.patchscope import Patchscope

back = (pl.col("source_layer") > pl.col("target_layer")) & (pl.col("target_layer") > 0)  # the paper's pairs
forward = (pl.col("source_layer") < pl.col("target_layer")) & (pl.col("source_layer") > 0)  # as many the other way


def back_patch(
    position: Position | None = None, *, layer: Layers = "all", max_new_tokens: int = 10, stop: Sequence[str] = ()
) -> Patchscope:
    """The scope whose target is each source's own prompt. position: i*, an index or a piece of the prompt's text; None: i* = i.
    10 tokens, as in the published code."""
    return Patchscope(None, position, layer, max_new_tokens=max_new_tokens, stop=stop, name="back-patch")
