"""Controls: what stands in for a state, or for the text that it was read from, and the evidence of a text about its source.

Pure functions of tensors and texts, for any verbalizer, lens or trained adapter; scopes run them by name: `scope(source, controls=[…])`.
"""

from patchscopes.controls.other_model import OtherModel
from patchscopes.controls.random_blocks import RandomBlocks, random_blocks
from patchscopes.controls.shuffle import shuffled
from patchscopes.controls.stand_ins import VECTOR_KINDS, stand_ins
from patchscopes.controls.texts import answer_in_source, at_positions, conflict, majority, question_alone, source_text
from patchscopes.controls.vectors import (
    covariance_like,
    gaussian_of,
    mean_of,
    random_like,
    shrinkage,
    with_norms_of,
    zero_like,
)
from patchscopes.core.names import CONTROLS, USUAL_CONTROLS

__all__ = [
    "CONTROLS",
    "USUAL_CONTROLS",
    "VECTOR_KINDS",
    "OtherModel",
    "RandomBlocks",
    "answer_in_source",
    "at_positions",
    "conflict",
    "covariance_like",
    "gaussian_of",
    "majority",
    "mean_of",
    "question_alone",
    "random_blocks",
    "random_like",
    "shrinkage",
    "shuffled",
    "source_text",
    "stand_ins",
    "with_norms_of",
    "zero_like",
]
