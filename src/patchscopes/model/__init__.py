"""Load a model, name its tokens and positions, run it. Names are imported when first used: some need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchscopes.model.loading import load
    from patchscopes.model.model import Model
    from patchscopes.model.tokens import Span, Tokens

_HOMES = {
    "load": "patchscopes.model.loading",
    "Model": "patchscopes.model.model",
    "Span": "patchscopes.model.tokens",
    "Tokens": "patchscopes.model.tokens",
}

__all__ = ["Model", "Span", "Tokens", "load"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'patchscopes.model' has no attribute {name!r}; it has {', '.join(__all__)}")
