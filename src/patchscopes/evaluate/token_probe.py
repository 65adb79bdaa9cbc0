"""Which token stands at a place, read off a state by a linear probe in closed form.

    log p(token = c | h) = μ_cᵀ Σ⁻¹ h − ½ μ_cᵀ Σ⁻¹ μ_c + log π_c + const

μ_c and π_c are mean and share of the training states of token c, Σ their covariance within tokens, shrunk: (1 − λ) S + λ tr(T)/d, T the
covariance over all. That is the softmax of a linear map: the probe that logistic regression looks for by gradient descent if states of a
token are Gaussian with one covariance (Fisher 1936, linear discriminants). Nothing is left to chance or to a number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

SHRINK = 0.01


def probability_of(
    x: Float[Tensor, "train d_model"],
    tokens: Sequence[int],
    z: Float[Tensor, "test d_model"],
    asked: Sequence[int],
    shrink: float = SHRINK,
) -> Float[Tensor, " test"]:
    """p(token = asked[k] | z[k]) of the probe of states x with their tokens. NaN where the token never stood in the training states."""
    x, z = x.double(), z.double()
    index = {token: k for k, token in enumerate(dict.fromkeys(tokens))}
    y = torch.tensor([index[token] for token in tokens])
    n = torch.bincount(y, minlength=len(index)).double()
    mean = torch.zeros(len(index), x.shape[1], dtype=torch.float64).index_add_(0, y, x) / n[:, None]
    within, whole = x - mean[y], x - x.mean(0)
    d = x.shape[1]
    level = shrink * float((whole**2).sum()) / len(x) / d
    sigma = (1 - shrink) * within.T @ within / len(x) + max(level, 1e-12) * torch.eye(d, dtype=torch.float64)
    weight = torch.linalg.solve(sigma, mean.T).T  # [class, d_model]
    bias = (n / n.sum()).log() - 0.5 * (weight * mean).sum(1)
    found = torch.full((len(z),), torch.nan, dtype=torch.float64)
    known = [k for k, token in enumerate(asked) if token in index]
    if known:
        log_p = (z[known] @ weight.T + bias).log_softmax(-1)
        found[known] = log_p[range(len(known)), [index[asked[k]] for k in known]].exp()
    return found
