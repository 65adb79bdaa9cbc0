"""Lenses: what a model would say from a lower layer. Each is a map into the last layer, and so a Patchscope. The logit lens is a scope."""

from patchscopes.lenses.jacobian_lens import JacobianLens, compute_jacobian_lens, load_jacobian_lens
from patchscopes.lenses.relation_map import relation_map
from patchscopes.lenses.report import LayerReport, LensReport, measure
from patchscopes.lenses.soft_prompt import FutureReport, PromptRecipe, SoftPrompt, load_soft_prompt, train_soft_prompt
from patchscopes.lenses.training import Recipe, TrainingProgress, refit_floor, train_tuned_lens
from patchscopes.lenses.tuned_lens import TunedLens, load_tuned_lens
from patchscopes.lenses.windows import read_texts, windows

__all__ = [
    "FutureReport",
    "JacobianLens",
    "LayerReport",
    "LensReport",
    "PromptRecipe",
    "Recipe",
    "SoftPrompt",
    "TrainingProgress",
    "TunedLens",
    "compute_jacobian_lens",
    "load_jacobian_lens",
    "load_soft_prompt",
    "load_tuned_lens",
    "measure",
    "read_texts",
    "refit_floor",
    "relation_map",
    "train_soft_prompt",
    "train_tuned_lens",
    "windows",
]
