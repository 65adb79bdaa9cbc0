"""Lenses: what a model would say from a lower layer. Each is a map into the last layer, and so a Patchscope. The logit lens is a scope.
Inverters read off a state which tokens it was made of."""

from patchscopes.lenses.inverter import HeadReport, Inverter, InverterRecipe, load_inverter, train_inverter
from patchscopes.lenses.jacobian_lens import JacobianLens, compute_jacobian_lens, load_jacobian_lens
from patchscopes.lenses.nearest import Nearest, TokenVectors, token_vectors
from patchscopes.lenses.relation_map import relation_map
from patchscopes.lenses.report import LayerReport, LensReport, measure
from patchscopes.lenses.soft_prompt import FutureReport, PromptRecipe, SoftPrompt, load_soft_prompt, train_soft_prompt
from patchscopes.lenses.training import Recipe, TrainingProgress, refit_floor, train_tuned_lens
from patchscopes.lenses.tuned_lens import TunedLens, load_tuned_lens
from patchscopes.lenses.windows import read_texts, windows

__all__ = [
    "FutureReport",
    "HeadReport",
    "Inverter",
    "InverterRecipe",
    "JacobianLens",
    "LayerReport",
    "LensReport",
    "Nearest",
    "PromptRecipe",
    "Recipe",
    "SoftPrompt",
    "TokenVectors",
    "TrainingProgress",
    "TunedLens",
    "compute_jacobian_lens",
    "load_inverter",
    "load_jacobian_lens",
    "load_soft_prompt",
    "load_tuned_lens",
    "measure",
    "read_texts",
    "refit_floor",
    "relation_map",
    "token_vectors",
    "train_inverter",
    "train_soft_prompt",
    "train_tuned_lens",
    "windows",
]
