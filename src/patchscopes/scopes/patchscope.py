"""The Patchscope: look at a hidden state of one run through another run whose prompt makes the model say what the state holds.

A source (S, i, M, ℓ) is looked at through a scope (T, i*, f, M*, ℓ*): while M* reads T, the value at layer ℓ* and position i* is
replaced by f(h), h the state of M at layer ℓ and position i of S, and M* goes on from there. Only the computation after the patch
changes. Ghandeharioun et al. 2024, "Patchscopes: A Unifying Framework for Inspecting Hidden Representations of Language Models".

Published code skips the patch when a pass has one token, and leaves padding to chance; here a one-token T is patched, and a batch
equals its cells run one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import torch

from patchscopes.controls.vectors import SECOND_LOOKS
from patchscopes.core.edits import Edit, Write
from patchscopes.core.errors import InputError
from patchscopes.core.layers import Layers
from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Position
from patchscopes.scopes.control_rows import Control
from patchscopes.scopes.readings import SCHEMA, Readings
from patchscopes.scopes.source import Source
from patchscopes.scopes.spread import Carry, Spread
from patchscopes.scopes.viewing import Progress, Viewing


@dataclass(frozen=True, eq=False)
class Patchscope:
    """(T, i*, f, M*, ℓ*), and how to go on from there. Call it on a `Source`, or on several of one model.

    prompt          T, or several; slots "{x}" may mark the places to patch. None: T = S, each source's own prompt
    position        i*: a piece of text or an index; not needed with a slot; several of them, or several slots: all of them are
                    patched; "same": i* = i. None: the text "x", or where T = S "same"
    layer           ℓ*: a layer, a list or range of them, "all", or "same" (ℓ* = ℓ); for other sites than "resid" the index of a block
    map             f, or several
    model           M*; None: the source's model
    max_new_tokens  tokens said at most
    stop            strings that end a text; they are not part of it
    site, write     where and how f(h) is written: "resid", "attn_out", "mlp_out"; "replace", "add", or one of these in proportion to
                    what is there, "replace_matched", "add_matched" (see `Edit`)
    spread, carry   at which layers beside ℓ* something is written, and what (see `spread`): "here" or "below", or distances from ℓ*;
                    "one" or "each"
    edits           further edits of every target run (see `Edit`): attention knocked out, a head steered, at the prompt or at later
                    tokens. Controls run under them too
    guidance        w: tokens are chosen by p + w (p − u), p the logits with the state in place and u those of the same text without it
                    (classifier-free guidance). Then `logprob`, `logits` and evidence are those of p + w (p − u); of runs in which nothing
                    is written (`nothing`, `text`) those of p
    temperature     0: greedy; else `draws` texts are sampled for every cell, from seeds that depend on `seed` and the cell alone
    second_look     the neutral text behind which sources are read again for their evidence, or several
    """

    prompt: Prompt | Sequence[Prompt] | None
    position: Position | Sequence[Position] | None = None
    layer: Layers = "same"
    map: Map | Sequence[Map] = Identity()
    model: Model | None = None
    max_new_tokens: int = 20
    stop: Sequence[str] = ()
    site: str = "resid"
    write: Write = "replace"
    spread: Spread = "here"
    carry: Carry = "one"
    edits: Sequence[Edit] = ()
    guidance: float = 0.0
    temperature: float = 0.0
    draws: int = 1
    seed: int = 0
    second_look: str | Sequence[str] = SECOND_LOOKS
    name: str = "patchscope"

    @property
    def looks(self) -> tuple[str, ...]:
        """The texts of the second looks. InputError if there is none."""
        found = (self.second_look,) if isinstance(self.second_look, str) else tuple(self.second_look)
        if not found:
            raise InputError("second_look is an empty list; expected a neutral text, or several")
        return found

    def __call__(
        self,
        source: Source | Sequence[Source],
        controls: bool | Control | Sequence[Control] = True,
        keep_logits: bool = False,
        *,
        evidence: bool = True,
        progress: Progress = lambda done, of, what: None,
    ) -> Readings:
        """Every combination of the source's prompts, positions and layers with the scope's prompts, layers, maps and draws.

        controls     also run every cell with nothing, a random vector, another source's vector and the layer's mean patched in, and
                     with the source's own words in the placeholder's place; and compute the evidence of each reading. Or a list of what
                     to run: names of `controls.CONTROLS`, `controls.OtherModel(model)`, `controls.RandomBlocks(seed)`
        evidence     False: only the rows of the controls, without the evidence, which takes some 30 runs of each text
        keep_logits  keep the next-token logits of every row of the table
        """
        viewing = Viewing(self, source, controls, evidence)
        outcomes = viewing.read(keep_logits=keep_logits, strict=True, progress=progress)
        table = pl.DataFrame([row for outcome in outcomes for row in outcome.rows], schema=SCHEMA)
        logits = torch.stack([one for outcome in outcomes for one in outcome.logits or ()]) if keep_logits else None
        return Readings(table, viewing.provenance(outcomes), logits)
