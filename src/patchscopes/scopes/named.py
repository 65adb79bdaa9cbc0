"""Scopes by name, as commands and experiment files call them."""

from __future__ import annotations

from patchscopes.core.names import SLOT, require_scope
from patchscopes.scopes.back_patch import back_patch
from patchscopes.scopes.describe import describe
from patchscopes.scopes.extract import extract
from patchscopes.scopes.identity import identity
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope


def named(scope: str) -> Patchscope:
    """The scope called so (`core.names.SCOPES`), or that of a prompt with a slot. UnknownName or PositionError if it is neither."""
    require_scope(scope)
    if SLOT in scope:
        return extract(scope)
    if scope == "back-patch":
        return back_patch()
    if scope == "describe":
        return describe(stop=(",", "\n"))  # one entity's description, not the list going on
    if scope == "logit-lens":
        return logit_lens()
    return identity(()) if scope == "identity-bare" else identity()
