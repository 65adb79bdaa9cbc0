"""Load a model, name its tokens and positions, run it."""

from patchscopes.model.load import load
from patchscopes.model.model import Model
from patchscopes.model.tokens import Span, Tokens

__all__ = ["Model", "Span", "Tokens", "load"]
