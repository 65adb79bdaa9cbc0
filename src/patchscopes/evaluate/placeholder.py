"""Placeholder contamination: what `spread="below"` does, beside the same with the state at ℓ* alone.

What stands below ℓ* at the placeholder is the placeholder's own, and later tokens attend to it (Ghandeharioun et al. 2024, 4.3 and D.3).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from patchscopes.evaluate import statistics
from patchscopes.evaluate.frame import Table


def spread_table(
    layers: Sequence[int],
    below: np.ndarray,
    here: np.ndarray,
    clusters: Sequence[Hashable],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> Table:
    """By target layer the rates of both, and their difference row by row. below, here: [row, layer], 0 to 1."""
    of = [0] * len(clusters) if groups is None else groups
    rows = tuple(
        (
            str(layer),
            *(statistics.mean_of_rates(one[:, k], of, clusters, seed=seed) for one in (below, here)),
            statistics.difference(below[:, k], here[:, k], clusters, of, seed=seed),
        )
        for k, layer in enumerate(layers)
    )
    columns = ("ℓ*", "every layer up to ℓ*", "ℓ* alone", "difference")
    return Table("spread", "Written at every layer up to ℓ*, and at ℓ* alone; all rows, paired", columns, rows, columns[1:])
