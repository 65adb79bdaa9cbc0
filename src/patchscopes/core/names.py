"""Names that commands and experiment files share, and what is wrong with one; no model is needed to say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from patchscopes.core.errors import InputError, PositionError, UnknownName, nearest

Preset = Literal[
    "back-patch", "describe", "identity", "identity-bare", "logit-lens", "embedding-space", "future-lens", "selfie", "repeat"
]  # made by scopes.named
SCOPES: tuple[Preset, ...] = get_args(Preset)
LENSES = ("logit-lens", "embedding-space")
SLOT = "{x}"  # stands in a target prompt where the state goes
PLACEHOLDER = "x"  # what the model reads there
ControlName = Literal[  # what may stand in a state's place: see docs/controls.md
    "nothing",
    "zero",
    "map_of_zero",
    "mean",
    "random",
    "random_covariance",
    "other",
    "context",
    "text",
    "text_at_position",
]
CONTROLS: tuple[ControlName, ...] = get_args(ControlName)
USUAL_CONTROLS = ("nothing", "random", "other", "mean", "text")
LENS_FILES = (("tuned_lens.safetensors",), ("config.json", "params.pt"))  # of a folder: as it is trained here; public
DtypeName = Literal["auto", "float32", "float64", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)


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


def named_controls(asked: Any) -> tuple[Any, ...]:
    """The controls that True, False, a name or a list asks for, each once, in order. What is no text is left to those who know it.
    UnknownName for names that are none, InputError for none at all."""
    if isinstance(asked, bool):
        return USUAL_CONTROLS if asked else ()
    some = list(asked) if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked]
    for one in some:
        if isinstance(one, str) and one not in CONTROLS:
            raise UnknownName(f"unknown control {one!r}. {nearest(one, CONTROLS)}")
    if not some:
        raise InputError("controls is an empty list; expected names of controls, or False for none")
    names = [one if isinstance(one, str) else getattr(one, "name", one) for one in some]
    if twice := [name for k, name in enumerate(names) if name in names[:k]]:
        raise InputError(f"the control {twice[0]!r} is there twice; expected each once, objects with names of their own")
    return tuple(some)
