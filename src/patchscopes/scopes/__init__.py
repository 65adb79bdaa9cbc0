"""Patchscopes: sources, scopes, readings, and the scopes of the paper as presets that differ in their settings alone."""

from patchscopes.scopes.back_patch import back_patch
from patchscopes.scopes.describe import describe
from patchscopes.scopes.extract import extract
from patchscopes.scopes.identity import identity
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.readings import Grid, Readings
from patchscopes.scopes.self_correct import in_one_prompt, self_correct
from patchscopes.scopes.source import Source

__all__ = [
    "Grid",
    "Patchscope",
    "Readings",
    "Source",
    "back_patch",
    "describe",
    "extract",
    "identity",
    "in_one_prompt",
    "logit_lens",
    "self_correct",
]
