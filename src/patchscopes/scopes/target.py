"""Target prompts: T with the position i* of its placeholder."""

from __future__ import annotations

from dataclasses import dataclass

from patchscopes.core.errors import PositionError, PromptError
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Position, Tokens

PLACEHOLDER = "x"
SLOT = "{x}"


@dataclass(frozen=True)
class Target:
    """A tokenized target prompt. `hole`: the characters [start, stop) of its text at which the placeholder stands; None: at none."""

    tokens: Tokens
    position: int
    hole: tuple[int, int] | None

    def filled(self, model: Model, words: str) -> Tokens | None:
        """The prompt with `words` in the placeholder's place; None where that cannot be (no text stands there, or it gets too long)."""
        if self.hole is None or not words.strip():
            return None
        start, stop = self.hole
        before = self.tokens.text[:start]
        try:
            return model.tokens(before + words.strip() + self.tokens.text[stop:])
        except PromptError:
            return None


def resolve_target(model: Model, prompt: Prompt, position: Position) -> Target:
    """The target prompt with its i*.

    A slot "{x}" in the prompt stands for the placeholder and settles the position; else `position` is an index or a piece of text.
    PositionError if the placeholder is absent or ambiguous.
    """
    if isinstance(prompt, str) and SLOT in prompt:
        if prompt.count(SLOT) > 1:
            raise PositionError(f"the target prompt {prompt!r} has {prompt.count(SLOT)} slots {SLOT}; expected one")
        start = prompt.index(SLOT)
        text = prompt.replace(SLOT, PLACEHOLDER)
        tokens = model.tokens(text)
        span = tokens.find(PLACEHOLDER, occurrence=text[: start + 1].count(PLACEHOLDER))
        return Target(tokens, span.last, (start, start + 1))
    tokens = model.tokens(prompt)
    try:
        index = tokens.position(position)
    except PositionError as e:
        if position == PLACEHOLDER:
            raise PositionError(
                f"the target prompt {tokens.text!r} needs a place to patch: {e} Mark it with {SLOT}, or give position=…"
            ) from None
        raise
    if isinstance(position, str) and tokens.text.count(position) == 1:
        start = tokens.text.index(position)
        return Target(tokens, index, (start, start + len(position)))
    start, stop = tokens.offsets[index]
    start += len(tokens.text[start:stop]) - len(tokens.text[start:stop].lstrip())
    return Target(tokens, index, (start, stop) if stop > start else None)
