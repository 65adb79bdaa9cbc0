"""Where in a prompt: an index of a real token, a piece of its text, a span of tokens. Resolved by `Tokens.position`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `last`, both included."""

    first: int
    last: int


Position = int | str | Span  # an index, a piece of the text, or the last token of a span
Positions = Position | Sequence[Position] | None  # several; None: every token of the prompt
