"""Names that commands and experiment files share, and what is wrong with one; no model is needed to say it."""

from __future__ import annotations

from patchscopes.core.errors import PositionError, UnknownName, nearest

SCOPES = ("back-patch", "describe", "identity", "identity-bare", "logit-lens", "embedding-space", "future-lens", "selfie")
LENSES = ("logit-lens", "embedding-space")  # made by scopes.named
SLOT = "{x}"  # stands in a target prompt where the state goes
LENS_FILES = (("tuned_lens.safetensors",), ("config.json", "params.pt"))  # of a folder: as it is trained here; public
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


def require_scope(scope: str) -> None:
    """UnknownName or PositionError if `scope` is neither the name of a scope nor a prompt with a slot."""
    if SLOT in scope or scope in SCOPES:
        return
    if " " in scope.strip():
        raise PositionError(
            f"the scope prompt {scope!r} has no {SLOT}; expected one where the state goes: 'The capital of {SLOT} is'"
        )
    raise UnknownName(
        f"unknown scope {scope!r}. {nearest(scope, SCOPES)} Or give a prompt of your own with {SLOT} where the state goes."
    )
