"""Scopes by name, as commands and experiment files call them."""

from __future__ import annotations

from patchscopes.core.names import LENSES, SLOT, require_scope
from patchscopes.scopes.back_patch import back_patch
from patchscopes.scopes.describe import describe
from patchscopes.scopes.embedding_space import embedding_space
from patchscopes.scopes.extract import extract
from patchscopes.scopes.future_lens import future_lens
from patchscopes.scopes.identity import identity
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.repeat import repeat
from patchscopes.scopes.selfie import selfie


def named(scope: str) -> Patchscope:
    """The scope called so (`core.names.SCOPES`), or that of a prompt with a slot. UnknownName or PositionError if it is neither."""
    require_scope(scope)
    if SLOT in scope:
        return extract(scope)
    if scope == "back-patch":
        return back_patch()
    if scope == "describe":
        return describe(stop=(",", "\n"))  # one entity's description, not the list going on
    if scope in LENSES:
        return logit_lens() if scope == "logit-lens" else embedding_space()
    if scope == "future-lens":
        return future_lens()
    if scope == "selfie":
        return selfie()
    if scope == "repeat":
        return repeat()
    return identity(()) if scope == "identity-bare" else identity()
