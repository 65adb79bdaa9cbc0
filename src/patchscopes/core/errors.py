"""Everything that can go wrong, in one tree; the number is the exit code of the command line.

    PatchscopesError            1
    ├── InputError              2   what the user asked for cannot be
    │   ├── PromptError             empty, or longer than the model's context
    │   ├── PositionError           text absent or ambiguous, index out of range, no placeholder
    │   ├── LayerError              out of range, or not a layer
    │   ├── SiteError               unknown, or not on this model
    │   ├── UnknownName              an unknown scope, map or option: the nearest is suggested
    │   └── VectorError             wrong width, not finite, without direction
    ├── NotAvailableError       4   a model, tokenizer or file is not here
    ├── ResourceError           5   memory or disk
    └── RefusedError            6   unsupported on this model, or unsafe; says which ability is missing and why

A message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PatchscopesError(Exception):
    """Base of all errors of this project."""

    exit_code = 1


class InputError(PatchscopesError, ValueError):
    """What was asked for cannot be."""

    exit_code = 2


class PromptError(InputError):
    """An empty prompt, or one that does not fit the model's context."""


class PositionError(InputError):
    """A position that is not in the prompt, or is there more than once."""


class LayerError(InputError):
    """A layer that the model has not."""


class SiteError(InputError):
    """A site that does not exist, or that this model has not."""


class UnknownName(InputError):
    """An unknown name of a scope, map or option."""


class VectorError(InputError):
    """A vector of the wrong width, or one that is not finite."""


class NotAvailableError(PatchscopesError):
    """A model, tokenizer or file that is not here."""

    exit_code = 4


class ResourceError(PatchscopesError):
    """Not enough memory or disk."""

    exit_code = 5


class RefusedError(PatchscopesError):
    """Something that this model, or safety, does not allow."""

    exit_code = 6


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean …?' with the most similar known names, or a list of all of them when none is similar."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known: {', '.join(known)}."
