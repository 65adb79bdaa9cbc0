"""Patchscopes: sources, scopes, readings, and the scopes of the paper as presets that differ in their settings alone."""

from patchscopes.scopes.describe import describe
from patchscopes.scopes.extract import extract
from patchscopes.scopes.identity import identity
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.readings import Grid, Readings
from patchscopes.scopes.source import Source

__all__ = ["Grid", "Patchscope", "Readings", "Source", "describe", "extract", "identity", "logit_lens"]
