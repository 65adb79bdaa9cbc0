"""Causal tracing: which state, put back into a run whose subject was drowned in noise, brings the answer back.

T = S with ε ~ N(0, σ²) added to the embeddings of the subject's tokens, i* = i, ℓ* = ℓ, f = identity (Meng et al. 2022, "Locating and
Editing Factual Associations in GPT"; Ghandeharioun et al. 2024, tables 1 and 4). Meng et al. take σ = 3 standard deviations of the
embeddings and the mean over ten draws of ε; here each draw is a scope of its own (`seed`). Embeddings are what the site `embed` gives:
models that scale the rows of their matrix there (Gemma by √d_model) get σ scaled alike, or the noise would drown nothing. The
figures of Meng et al. write a window of ten layers of `mlp_out` or `attn_out`: that is, on source and scope,
`site="mlp_out", spread=(-5, …, 0, …, 4), carry="each"`.

    source    every state of the clean run: Source(model, prompt, position="all")
    none      p(answer) with that state put back        nothing   p(answer) with noise alone
"""

from __future__ import annotations

from typing import Any

import torch

from patchscopes.core.edits import Edit
from patchscopes.core.errors import InputError
from patchscopes.core.positions import Position, Span
from patchscopes.model.model import Model, Prompt
from patchscopes.model.tokens import Tokens
from patchscopes.scopes.patchscope import Patchscope
from patchscopes.scopes.spread import Carry, Spread
from patchscopes.scopes.target import SAME


def causal_tracing(
    model: Model,
    prompt: Prompt,
    subject: Position,
    *,
    noise: int | float = 3.0,
    seed: int = 0,
    site: str = "resid",
    spread: Spread = "here",
    carry: Carry = "each",
) -> Patchscope:
    """The scope for states of `prompt`, with noise of `noise` standard deviations of the embeddings at the tokens of `subject`. The model
    reads `prompt` once, to see how long its embeddings are. InputError if noise is below 0; PositionError if there is no such subject."""
    if noise < 0:
        raise InputError(f"noise is {noise:g}; expected a number of standard deviations, at least 0")
    tokens = model.tokens(prompt)
    span = Span(tokens.first(subject), tokens.position(subject))
    sigma = noise * _deviation(model, tokens)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that all devices draw the same
    epsilon = sigma * torch.randn(span.last - span.first + 1, model.d_model, generator=generator)
    edit = Edit("embed", list(range(span.first, span.last + 1)), epsilon.to(model.device, model.dtype), "add")
    return Patchscope(
        tokens,
        position=SAME,
        max_new_tokens=1,
        site=site,
        spread=spread,
        carry=carry,
        edits=[edit],
        name="causal-tracing",
    )


def _deviation(model: Model, tokens: Tokens) -> float:
    """Of the embeddings as `embed` gives them: that of the matrix, times how much longer its rows are there. Positions do not count."""
    hf: Any = model.hf
    weight = hf.get_input_embeddings().weight.detach()
    rows, given = weight[list(tokens.ids)].float(), model.run(tokens, read="embed")["embed"].float()
    scale = given.square().mean().sqrt().cpu() / rows.square().mean().sqrt().cpu()
    return float(weight.float().std().cpu() * scale)
