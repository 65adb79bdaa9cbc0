"""Target prompts: T with the positions i* of its placeholders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from patchscopes.core.edits import Edit
from patchscopes.core.errors import InputError, PositionError, PromptError
from patchscopes.core.names import PLACEHOLDER, SLOT
from patchscopes.core.positions import Span
from patchscopes.engine.edits import Placed
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Position, Tokens
from patchscopes.scopes.source import Place

SAME = "same"  # as a position: i* = i
OWN = "(the source's own prompt)"  # how a target is shown where T = S

Hole = tuple[int, int]


@dataclass(frozen=True)
class Target:
    """A tokenized target prompt.

    positions  of its placeholders, in order; with i* = i of none, before a source is known
    holes      the characters [start, stop) of its text at which placeholders stand, those side by side as one
    """

    tokens: Tokens
    positions: tuple[int, ...]
    holes: tuple[Hole, ...]
    model: Model
    edits: Sequence[Edit] = ()

    @property
    def position(self) -> int:
        """Of the first placeholder: from here on the patch changes something."""
        return self.positions[0] if self.positions else 0

    @cached_property
    def more(self) -> tuple[Placed, ...]:
        """The scope's further edits, placed in this prompt."""
        return self.edited(self.tokens)

    @cached_property
    def digest(self) -> str:
        """A hash of token ids, positions and further edits."""
        where = self.positions[0] if len(self.positions) == 1 else self.positions
        content = repr((self.tokens.ids, where, [edit.digest for edit in self.edits]))
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def edited(self, tokens: Tokens) -> tuple[Placed, ...]:
        """The same in another prompt."""
        return tuple(self.model.placed(self.edits, [tokens]))

    def at(self, positions: Sequence[int]) -> Target:
        """The same prompt, patched elsewhere. PositionError if it has no such positions."""
        if max(positions) >= len(self.tokens):
            raise PositionError(
                f"position='same' writes where the source was read, at {max(positions)}, but the target prompt {self.tokens.text!r} has "
                f"{len(self.tokens)} tokens, 0 to {len(self.tokens) - 1}"
            )
        return replace(self, positions=tuple(positions))

    def widened(self, n: int) -> Target:
        """With places for n states: its only placeholder n times, token by token. PositionError if it has several, and not n."""
        if len(self.positions) == n or n == 1:
            return self
        if len(self.positions) != 1:
            raise PositionError(
                f"the source has {n} states to write together, but the target prompt {self.tokens.text!r} has {len(self.positions)} "
                f"placeholders; expected one, which is then repeated, or {n}"
            )
        t, p = self.tokens, self.positions[0]

        def wide(each: tuple) -> tuple:
            return (*each[:p], *[each[p]] * n, *each[p + 1 :])

        images = tuple(Span(s.first + (n - 1) * (s.first > p), s.last + (n - 1) * (s.last > p)) for s in t.images)
        tokens = replace(
            t, ids=wide(t.ids), strings=wide(t.strings), offsets=wide(t.offsets), special=wide(t.special), images=images
        )
        return replace(self, tokens=tokens, positions=tuple(range(p, p + n)))

    def filled(self, words: str) -> Tokens | None:
        """The prompt with `words` in the placeholders' places; None where that cannot be (no text stands there, it gets too long, or the
        edits' places are not in it)."""
        if not self.holes or not words.strip():
            return None
        text, end = "", 0
        for start, stop in self.holes:
            text, end = text + self.tokens.text[end:start] + words.strip(), stop
        try:
            tokens = self.model.tokens(text + self.tokens.text[end:])
            self.edited(tokens)
        except (PromptError, PositionError):
            return None
        return tokens


def resolve_target(
    model: Model, prompt: Prompt, position: Position | Sequence[Position] | None, edits: Sequence[Edit] = ()
) -> Target:
    """The target prompt with its i*.

    Slots "{x}" in the prompt stand for the placeholder and settle the positions; else `position` is an index or a piece of text, or
    several, or "same" (i* = i, which `Target.at` fills in). None: "x". PositionError if a placeholder is absent or ambiguous.
    """
    position = PLACEHOLDER if position is None else position
    if isinstance(prompt, str) and SLOT in prompt:
        text = prompt.replace(SLOT, PLACEHOLDER)
        tokens, pieces = model.tokens(text), prompt.split(SLOT)[:-1]
        starts = [sum(map(len, pieces[: k + 1])) + k for k in range(len(pieces))]
        found = [tokens.find(PLACEHOLDER, occurrence=text[: start + 1].count(PLACEHOLDER)).last for start in starts]
        holes = [(start, start + 1) for start in starts]
        return Target(tokens, tuple(dict.fromkeys(found)), _joined(text, holes), model, edits)
    tokens = model.tokens(prompt)
    if position == SAME:
        return Target(tokens, (), (), model, edits)
    several = [position] if isinstance(position, (int, str, Span)) else list(position)
    if not several:
        raise PositionError("position is an empty list; expected at least one place to patch")
    try:
        places = {tokens.position(one): _hole(tokens, one) for one in several}
    except PositionError as e:
        if position == PLACEHOLDER:
            raise PositionError(
                f"the target prompt {tokens.text!r} needs a place to patch: {e} Mark it with {SLOT}, or give position=…"
            ) from None
        raise
    holes = [hole for at in sorted(places) if (hole := places[at]) is not None]
    whole = len(holes) == len(places)
    return Target(tokens, tuple(sorted(places)), _joined(tokens.text, holes) if whole else (), model, edits)


def _hole(tokens: Tokens, position: Position) -> Hole | None:
    """The characters of a placeholder; None where it has none."""
    if isinstance(position, str) and tokens.text.count(position) == 1:
        start = tokens.text.index(position)
        return (start, start + len(position))
    start, stop = tokens.offsets[tokens.position(position)]
    start += len(tokens.text[start:stop]) - len(tokens.text[start:stop].lstrip())
    return (start, stop) if stop > start else None


def _joined(text: str, holes: Sequence[Hole]) -> tuple[Hole, ...]:
    """Holes with nothing but space between them as one: words stand there once."""
    found: list[Hole] = []
    for start, stop in holes:
        if found and start >= found[-1][1] and not text[found[-1][1] : start].strip():
            found[-1] = (found[-1][0], stop)
        elif not found or start >= found[-1][1]:
            found.append((start, stop))
    return tuple(found)


def own_target(place: Place, position: Position | Sequence[Position] | None, model: Model, edits: Sequence[Edit]) -> Target:
    """T = S: a source's own prompt as the target; i* = i, unless other positions are given. Nothing stands for the state there, so no
    words can take its place. InputError for a vector without a prompt."""
    if place.tokens is None:
        raise InputError(
            f"{place.text!r} is a vector without a prompt, so it cannot go back into its own; expected sources that are prompts"
        )
    if position is None or position == SAME:
        return Target(place.tokens, tuple(place.positions), (), model, edits)
    return replace(resolve_target(model, place.tokens, position, edits), holes=())
