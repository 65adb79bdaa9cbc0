"""Target prompts: T with the position i* of its placeholder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from patchscopes.core.edits import Edit
from patchscopes.core.errors import InputError, PositionError, PromptError
from patchscopes.core.names import SLOT
from patchscopes.engine.edits import Placed
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Position, Tokens

PLACEHOLDER = "x"
OWN = "(the source's own prompt)"  # how a target is shown where T = S


@dataclass(frozen=True)
class Target:
    """A tokenized target prompt. `hole`: the characters [start, stop) of its text at which the placeholder stands; None: at none."""

    tokens: Tokens
    position: int
    hole: tuple[int, int] | None
    model: Model
    edits: Sequence[Edit] = ()

    @cached_property
    def more(self) -> tuple[Placed, ...]:
        """The scope's further edits, placed in this prompt."""
        return self.edited(self.tokens)

    @cached_property
    def digest(self) -> str:
        """A hash of token ids, position and further edits."""
        content = repr((self.tokens.ids, self.position, [edit.digest for edit in self.edits]))
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def edited(self, tokens: Tokens) -> tuple[Placed, ...]:
        """The same in another prompt."""
        return tuple(self.model.placed(self.edits, [tokens]))

    def filled(self, words: str) -> Tokens | None:
        """The prompt with `words` in the placeholder's place; None where that cannot be (no text stands there, it gets too long, or the
        edits' places are not in it)."""
        if self.hole is None or not words.strip():
            return None
        start, stop = self.hole
        before = self.tokens.text[:start]
        try:
            tokens = self.model.tokens(before + words.strip() + self.tokens.text[stop:])
            self.edited(tokens)
        except (PromptError, PositionError):
            return None
        return tokens


def resolve_target(model: Model, prompt: Prompt, position: Position | None, edits: Sequence[Edit] = ()) -> Target:
    """The target prompt with its i*.

    A slot "{x}" in the prompt stands for the placeholder and settles the position; else `position` is an index or a piece of text.
    None: "x". PositionError if the placeholder is absent or ambiguous.
    """
    position = PLACEHOLDER if position is None else position
    if isinstance(prompt, str) and SLOT in prompt:
        if prompt.count(SLOT) > 1:
            raise PositionError(f"the target prompt {prompt!r} has {prompt.count(SLOT)} slots {SLOT}; expected one")
        start = prompt.index(SLOT)
        text = prompt.replace(SLOT, PLACEHOLDER)
        tokens = model.tokens(text)
        span = tokens.find(PLACEHOLDER, occurrence=text[: start + 1].count(PLACEHOLDER))
        return Target(tokens, span.last, (start, start + 1), model, edits)
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
        return Target(tokens, index, (start, start + len(position)), model, edits)
    start, stop = tokens.offsets[index]
    start += len(tokens.text[start:stop]) - len(tokens.text[start:stop].lstrip())
    return Target(tokens, index, (start, stop) if stop > start else None, model, edits)


def own_target(
    model: Model, text: str, tokens: Tokens | None, read: int, position: Position | None, edits: Sequence[Edit]
) -> Target:
    """T = S: a source's own prompt as the target; i* = i, the position `read`, unless another is given. Nothing stands for the state
    there, so no words can take its place. InputError for a vector without a prompt."""
    if tokens is None:
        raise InputError(
            f"{text!r} is a vector without a prompt, so it cannot go back into its own; expected sources that are prompts"
        )
    return Target(tokens, read if position is None else tokens.position(position), None, model, edits)
