"""Patchscopes: sources, scopes, readings, and the scopes of the paper and its relatives as presets that differ in their settings alone."""

from patchscopes.scopes.activation_difference import Difference, activation_difference, difference_scope, in_all
from patchscopes.scopes.attention_knockout import attention_knockout
from patchscopes.scopes.attribute_lens import attribute_lens
from patchscopes.scopes.back_patch import back_patch
from patchscopes.scopes.causal_tracing import causal_tracing
from patchscopes.scopes.cross_model import cross_model
from patchscopes.scopes.describe import describe
from patchscopes.scopes.directions import Explained, explain, lengths
from patchscopes.scopes.embedding_space import embedding_space
from patchscopes.scopes.extract import extract
from patchscopes.scopes.future_lens import FUTURE_PROMPTS, future_lens
from patchscopes.scopes.identity import identity
from patchscopes.scopes.linear_shortcut import linear_shortcut
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.readings import Grid, Readings
from patchscopes.scopes.repeat import repeat
from patchscopes.scopes.self_correct import in_one_prompt, self_correct
from patchscopes.scopes.selfie import Relevancy, relevancy, selfie
from patchscopes.scopes.source import Source
from patchscopes.scopes.superscopes import best_of, chosen, criterion, superscope

__all__ = [
    "FUTURE_PROMPTS",
    "Difference",
    "Explained",
    "Grid",
    "Patchscope",
    "Readings",
    "Relevancy",
    "Source",
    "activation_difference",
    "attention_knockout",
    "attribute_lens",
    "back_patch",
    "best_of",
    "causal_tracing",
    "chosen",
    "criterion",
    "cross_model",
    "describe",
    "difference_scope",
    "embedding_space",
    "explain",
    "extract",
    "future_lens",
    "identity",
    "in_all",
    "in_one_prompt",
    "lengths",
    "linear_shortcut",
    "logit_lens",
    "relevancy",
    "repeat",
    "self_correct",
    "selfie",
    "superscope",
]
