"""Linear probes as a baseline: multinomial logistic regression, cross-validated with folds that hold entities together.

    min over W, b of   Σ_i −log softmax(W x_i + b)[y_i] + ½ ‖W‖²        (L2 as in scikit-learn with C = 1; b is not penalised)

on features that are standardised on the training folds. The problem is strictly convex in W, so its solution is the same whatever finds
it; here L-BFGS. The paper's folds split rows, of which up to five share a subject, so that its probe has seen the subject (Ghandeharioun
et al. 2024, 4.2); here folds split subjects.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

FOLDS, STEPS = 3, 200


def fit(x: Float[Tensor, "row feature"], y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(W [class, feature], b [class]) of the problem above, for y in 0…classes−1."""
    x = x.double()
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        found = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="sum") + 0.5 * (weight**2).sum()
        found.backward()
        return found

    solver.step(loss)  # type: ignore[arg-type]  # a closure that gives a tensor
    return weight.detach(), bias.detach()


def folds_of(clusters: Sequence[Hashable], seed: int = 0, folds: int = FOLDS) -> np.ndarray:
    """The fold of every row: clusters are dealt out at random, none is in two folds."""
    names = list(dict.fromkeys(clusters))
    order = np.random.default_rng(seed).permutation(len(names))
    fold = {names[k]: place % folds for place, k in enumerate(order)}
    return np.array([fold[cluster] for cluster in clusters], int)


def held_out_hits(
    x: Float[Tensor, "row feature"], answers: Sequence[Hashable], clusters: Sequence[Hashable], *, seed: int = 0
) -> np.ndarray | None:
    """For every row: does a probe of the other folds say its answer? None if there are fewer clusters than folds, or one answer only. An
    answer that is not among the training rows is a miss."""
    if len(set(clusters)) < FOLDS or len(set(answers)) < 2:
        return None
    fold = folds_of(clusters, seed)
    hits = np.zeros(len(answers), bool)
    for k in range(FOLDS):
        train, test = np.flatnonzero(fold != k).tolist(), np.flatnonzero(fold == k).tolist()
        classes = list(dict.fromkeys(answers[i] for i in train))
        mean, std = x[train].mean(0), x[train].std(0, unbiased=False).clamp_min(1e-8)
        y = torch.tensor([classes.index(answers[i]) for i in train])
        weight, bias = fit((x[train] - mean) / std, y, len(classes))
        says = (((x[test] - mean) / std).double() @ weight.T + bias).argmax(1).tolist()
        hits[test] = [classes[c] == answers[i] for c, i in zip(says, test, strict=True)]
    return hits
