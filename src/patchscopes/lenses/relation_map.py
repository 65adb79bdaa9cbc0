"""Relation map: what a relation does to its subject, to first order and on average over some examples: the map of an attribute lens.

    f(s) = β W s + b        W = mean_k J_k,   b = mean_k (o_k − J_k s_k),   J_k = ∂o_k / ∂s_k

s_k is the state at layer ℓ of the last token of the k-th example's subject, o_k the raw state at layer L of the last token of its prompt,
where the model is about to say the object (Hernandez et al. 2024, "Linearity of Relation Decoding in Transformer Language Models"). β makes
up for slopes that are too small: final norms damp what grows. With β = 1 and one example f(s_1) = o_1. Nothing is trained; no object
need be known. Whether the relation is linear at ℓ is for subjects that were no examples to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from patchscopes.core.errors import InputError, LayerError
from patchscopes.core.layers import resolve_layers
from patchscopes.core.positions import Position
from patchscopes.engine.run import Run
from patchscopes.lenses.report import Progress
from patchscopes.lenses.windows import require_one_stream
from patchscopes.maps import Affine, ByLayer
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Tokens


def relation_map(
    model: Model,
    prompts: Sequence[Prompt],
    subjects: Sequence[Position],
    layer: int,
    *,
    beta: int | float = 1.0,
    name: str = "relation",
    dims_at_once: int = 32,
    progress: Progress = lambda done, of, what: None,
) -> ByLayer:
    """The map from `layer` into L of one relation, for `scopes.attribute_lens`; `name` tells it from those of others.

    prompts       examples that put the relation in words and end where the object is to come: "The capital of Japan is"
    subjects      of each the place of its subject: "Japan"
    dims_at_once  rows of J of one pass there and back; d_model / dims_at_once passes an example

    InputError if prompts and subjects do not belong together, PositionError if a subject is not in its prompt, LayerError if ℓ is not
    below L, RefusedError on quantised layers and several residual streams.
    """
    require_one_stream(model)
    if isinstance(prompts, (str, Tokens)) or isinstance(subjects, str) or len(prompts) != len(subjects) or not prompts:
        raise InputError(
            f"the prompts are {prompts!r} and the subjects {subjects!r}; expected a list of each, and one for each other"
        )
    if not isfinite(beta):
        raise InputError(f"beta is {beta}; expected a finite number")
    if dims_at_once < 1:
        raise InputError(f"dims_at_once is {dims_at_once}; expected at least 1")
    (resolved,) = resolve_layers(layer, model.n_layers)
    if resolved == model.n_layers:
        raise LayerError(f"layer {layer} is the last one, where the object is read; expected 0 to {model.n_layers - 1}")
    examples = [model.tokens(prompt) for prompt in prompts]
    places = [tokens.position(subject) for tokens, subject in zip(examples, subjects, strict=True)]
    weight = torch.zeros(model.d_model, model.d_model, dtype=torch.float64)
    bias = torch.zeros(model.d_model, dtype=torch.float64)
    for k, (tokens, place) in enumerate(zip(examples, places, strict=True)):
        j, s, o = _example(model, tokens, place, resolved, dims_at_once)
        weight += j / len(examples)
        bias += (o - j @ s) / len(examples)
        progress(k + 1, len(examples), "derivatives")
    return ByLayer({(resolved, model.n_layers): Affine((beta * weight).float(), bias.float(), name)}, name)


def _example(
    model: Model, tokens: Tokens, place: int, layer: int, dims_at_once: int
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """J, s and o of one prompt, in float64 on the CPU. The prompt is run once for each row of J."""
    last, at = f"resid.{model.n_layers}", f"resid.{layer}"
    found = []
    for start in range(0, model.d_model, dims_at_once):
        dims = torch.arange(start, min(start + dims_at_once, model.d_model))

        def each(run: Run, dims: Tensor = dims) -> Tensor:
            return run[last][torch.arange(len(dims)), -1, dims]

        g = model.gradients([tokens] * len(dims), each, wrt=[at, last])
        found.append((g[at][:, place].double().cpu(), g.run[at][0, place].double().cpu(), g.run[last][0, -1].double().cpu()))
    return torch.cat([one for one, _, _ in found]), *found[0][1:]
