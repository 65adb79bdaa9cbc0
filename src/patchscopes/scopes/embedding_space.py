"""Embedding-space projection: a vector's place in the space of the vocabulary.

Dar et al. 2023, "Analyzing Transformers in Embedding Space", read any vector of width d_model (a state, a row of W_out, a difference)
as a point among the token embeddings. In the taxonomy of Ghandeharioun et al. 2024 (tables 1 and 4) that is ℓ* = L*, T any, f = identity:
the configuration of the logit lens under another name, and the same numbers. Dar et al. multiply by the embedding matrix alone; here, as
in the taxonomy, the model's own final norm comes before its head. Vectors of your own come from `Source.of_vectors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patchscopes.maps import Identity, Map
from patchscopes.model.model import Model
from patchscopes.scopes.logit_lens import logit_lens
from patchscopes.scopes.patchscope import Patchscope


def embedding_space(*, map: Map | Sequence[Map] = Identity(), model: Model | None = None) -> Patchscope:
    """Embedding-space projection as a scope: the logit lens by another name."""
    return replace(logit_lens(map=map, model=model), name="embedding-space")
