"""Positions of two tokenizations of one text that have seen the same: tokens that end at the same character."""

from __future__ import annotations

from patchscopes.model.tokens import Tokens


def aligned(source: Tokens, target: Tokens) -> list[tuple[int, int]]:
    """(position, position) of every character at which tokens of both end; of several that end there (pieces of one character) the
    last. Tokens that a tokenizer added (BOS) stand for no character, and the first of the others is left out in both: on many models its
    state is hundreds of times longer than any other, and it would be all that least squares sees."""
    ends, others = _ends(source), _ends(target)
    return [(ends[character], others[character]) for character in sorted(ends.keys() & others.keys())]


def _ends(tokens: Tokens) -> dict[int, int]:
    found: dict[int, int] = {}
    own = [i for i, (start, stop) in enumerate(tokens.offsets) if stop > start and not tokens.special[i]]
    for i in own[1:] if own and own[0] == 0 else own:
        found[tokens.offsets[i][1]] = i
    return found
