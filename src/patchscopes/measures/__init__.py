"""Measures of faithfulness: does what a scope says follow the state, and the model's behaviour with it? Each works on any source and scope,
and gives its figures beside its nulls."""

from patchscopes.measures.dose import Dose, dose_response
from patchscopes.measures.prediction import Paired, Prediction, prediction
from patchscopes.measures.reconstruction import Rebuilt, Reconstruction, reconstruction
from patchscopes.measures.swap import Agreement, Swap, agreement_of, causal_swap, class_directions

__all__ = [
    "Agreement",
    "Dose",
    "Paired",
    "Prediction",
    "Rebuilt",
    "Reconstruction",
    "Swap",
    "agreement_of",
    "causal_swap",
    "class_directions",
    "dose_response",
    "prediction",
    "reconstruction",
]
