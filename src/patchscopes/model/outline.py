"""A model without its weights: tokens, layers and widths, as far as planning needs them.

It is made from config and tokenizer, on the device "meta", in a second whatever the model's size. What the self-check would measure is
taken for granted: the workers that load the weights measure it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchscopes.core.edits import Edit
from patchscopes.engine.check import MEANING, Ability, Capabilities
from patchscopes.engine.edits import Placed
from patchscopes.engine.shape import Shape, sketch
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens


@dataclass
class _Sketch:
    """What planning asks of an engine."""

    n_layers: int
    d_model: int
    vocab: int
    context: int | None
    config: Any
    device: torch.device
    encodes: bool = False
    streams: tuple[int, ...] = ()
    given: None = None


class Outline(Model):
    """A `Model` that cannot run."""

    def __init__(self, hf: torch.nn.Module, tokenizer: Any, *, name: str, revision: str | None = None):
        self.hf, self.tokenizer, self.name, self.revision, self.loaded = hf, tokenizer, name, revision, None
        given: Any = hf
        config = given.config.get_text_config(decoder=True)
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        context = next((int(n) for name in names if (n := getattr(config, name, None))), None)
        meta = torch.device("meta")
        stand_in: Any = _Sketch(config.num_hidden_layers, config.hidden_size, config.vocab_size, context, given.config, meta)
        self.engine = stand_in
        self.capabilities = Capabilities({name: Ability(True, 0.0, "assumed") for name in MEANING}, 0.0)
        self._given: dict[str, str] = {}

    def placed(self, edits: Sequence[Edit], batch: Sequence[Tokens]) -> list[Placed]:
        """None: where edits go is found inside the model, by those who have it."""
        return []

    @property
    def shape(self) -> Shape:
        """Its weights and heads, for costs."""
        return sketch(self.hf)
