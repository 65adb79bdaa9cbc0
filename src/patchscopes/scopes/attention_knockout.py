"""Attention knockout: what the model says when some tokens may not look at others.

T = S, and at several layers the weights of attention from `queries` to `keys` are 0 (Geva et al. 2023, "Dissecting Recall of Factual
Associations in Auto-Regressive Language Models"; Ghandeharioun et al. 2024, tables 1 and 4, who write it as f = 0 on those edges). The
knocking out is done by the scope's edits (`edits.knock_out`); the state that it is looked at with is the prompt's own embedding, put back
where it stands, which changes nothing:

    attention_knockout(prompt, -1, "France", blocks="2:6")(Source(model, prompt, position=-1, layer=0), controls=False)

Geva et al. set scores to −∞ before the softmax, so that the other keys share what is freed: the default. `after` sets the weights of the
pattern to 0 and leaves the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchscopes.core.edits import knock_out
from patchscopes.core.positions import Positions
from patchscopes.model.model import Prompt
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.target import SAME


def attention_knockout(
    prompt: Prompt,
    queries: Positions,
    keys: Positions,
    *,
    blocks: str | int = "*",
    heads: Sequence[int] = (),
    after: bool = False,
    max_new_tokens: int = 1,
) -> Patchscope:
    """The scope of `prompt` without attention from `queries` to `keys` in `blocks`."""
    closed = knock_out(blocks, queries, keys, heads=heads, after=after)
    return Patchscope(prompt, position=SAME, layer=0, edits=closed, max_new_tokens=max_new_tokens, name="attention-knockout")
