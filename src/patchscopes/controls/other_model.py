"""Another model's state of the same text: what is told of it comes from the words and the verbalizer, and not from the model that was read.

The state is taken at the same layer, at the token that ends at the same character.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchscopes.core.errors import PromptError
from patchscopes.maps import Map
from patchscopes.model.model import Model
from patchscopes.model.tokens import Tokens


@dataclass(frozen=True, eq=False)
class OtherModel:
    """A control of a scope. map: from this model's states to those of the source's model, needed where their widths differ."""

    model: Model
    map: Map | None = None
    name: str = "other_model"

    def positions(self, tokens: Tokens, positions: range) -> tuple[Tokens, range] | str:
        """The prompt as this model reads it, and where it has read the same; or why there is no such place."""
        if any(tokens.special[p] for p in positions):
            return "a token that the tokenizer added is in no text"
        try:
            own = self.model.tokens(tokens.text)
        except PromptError as error:
            return str(error)
        ends = {stop: k for k, (start, stop) in enumerate(own.offsets) if stop > start and not own.special[k]}
        found = [ends.get(tokens.offsets[p][1]) for p in positions]
        if None in found:
            return f"no token of {self.model.name} ends at the same character"
        first, last = found[0], found[-1]
        assert first is not None and last is not None
        if found != list(range(first, last + 1)):
            return f"{self.model.name} has other tokens there"
        return own, range(first, last + 1)
