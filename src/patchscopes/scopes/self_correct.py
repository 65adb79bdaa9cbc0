"""Multi-hop self-correction: the state at the end of the first hop's phrase is patched into the end of the second's, which goes on from it.

A question of two hops is [π2][π1], "The current CEO of" + "the company that created Visual Basic Script". A model that knows both facts
but fails at the question is helped to take one step after the other: S = π1 with i its last token, T = π2 with i* its last token,
f = identity, any ℓ and ℓ* (Ghandeharioun et al. 2024, section 5 and appendix F: the CoT Patchscope). Three forms:

    self_correct(π2)          two prompts, as in the published code
    in_one_prompt(π1, π2)     one prompt, π1 and then π2, from which attention to π1 is knocked out: the same, exactly, in models whose
                              positions are relative, since both prompts keep their own first tokens
    back_patch(position=i*)   the paper's other form: T = S = [π2][π1], i* the token before π1, no masks; the end of the prompt goes on

The paper calls the first and the last equivalent under masks; without masks they are not, and the end that goes on is another token.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchscopes.core.edits import knock_out
from patchscopes.core.layers import Layers
from patchscopes.core.names import SLOT
from patchscopes.model.model import Model
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.source import Source


def self_correct(second: str, *, layer: Layers = "all", max_new_tokens: int = 20, stop: Sequence[str] = ()) -> Patchscope:
    """The scope of the second hop's phrase π2, patched at its last token; or at {x}, if it has that slot. Look at sources that are
    first phrases π1, at their last token. 20 tokens, as in the paper."""
    place = None if SLOT in second else -1
    return Patchscope(second, place, layer, max_new_tokens=max_new_tokens, stop=stop, name="self-correct")


def in_one_prompt(
    model: Model,
    first: str,
    second: str,
    *,
    source_layer: Layers = "all",
    layer: Layers = "all",
    max_new_tokens: int = 20,
    stop: Sequence[str] = (),
) -> tuple[Source, Patchscope]:
    """Source and scope of one prompt that holds both phrases: the state at the end of π1 is patched at the end of π2, and no token of
    π2, nor any that follows, attends to π1."""
    one, two = model.tokens(first).ids, model.tokens(second).ids
    prompt = model.tokens([*one, *two])
    hidden, after = list(range(len(one))), list(range(len(one), len(prompt)))
    edits = knock_out("*", after, hidden, steps="always")
    source = Source(model, prompt, len(one) - 1, source_layer)
    return source, Patchscope(
        None, -1, layer, max_new_tokens=max_new_tokens, stop=stop, edits=edits, name="self-correct-in-one-prompt"
    )
