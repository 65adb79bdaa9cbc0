"""The probe skyline and its control task: is what a probe finds there because of the state, or because a probe can learn anything?

A control task deals the answers out anew: every entity gets one answer, drawn without regard to what it is, so that only what a probe
memorises of entities, or the frequencies of answers, helps it (Hewitt and Liang 2019, "Designing and Interpreting Probes with Control
Tasks", where types of words take the place of entities).

    selectivity = accuracy − accuracy on the control task                                    on the same folds

Folds hold entities together here (see `probe`), so nothing that was memorised helps with held-out ones: the accuracy on the control task
is what frequencies alone give, and a selectivity above 0 says that the answer is linearly there, whether or not a verbalizer says it.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from patchscopes.evaluate.probe import held_out_hits

DRAWS = 5


@dataclass(frozen=True)
class Selectivity:
    """hits: [row, probe], of the answers; control: [row, probe], of the control task, a mean over its draws."""

    hits: np.ndarray
    control: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """[probe]."""
        return self.hits.mean(axis=0)

    @property
    def control_accuracy(self) -> np.ndarray:
        """[probe]."""
        return self.control.mean(axis=0)

    @property
    def selectivity(self) -> np.ndarray:
        """[probe]: the one less the other."""
        return self.accuracy - self.control_accuracy


def control_task(
    answers: Sequence[Hashable], clusters: Sequence[Hashable], seed: int = 0, groups: Sequence[Hashable] | None = None
) -> list[Hashable]:
    """New answers: those of the clusters (the first of each) dealt out anew among the clusters of a group (a relation), one to each. How
    many clusters have an answer stays the same."""
    groups = [0] * len(answers) if groups is None else groups
    whose: dict[Hashable, dict[Hashable, Hashable]] = {}
    for answer, cluster, group in zip(answers, clusters, groups, strict=True):
        whose.setdefault(group, {}).setdefault(cluster, answer)
    rng = random.Random(f"{seed} control task")
    for of_cluster in whose.values():
        dealt = list(of_cluster.values())
        rng.shuffle(dealt)
        of_cluster.update(zip(of_cluster, dealt, strict=True))
    return [whose[group][cluster] for cluster, group in zip(clusters, groups, strict=True)]


def selectivity(
    x: Float[Tensor, "probe row feature"],
    answers: Sequence[Hashable],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Selectivity | None:
    """Probes of the answers beside probes of `draws` control tasks, cross-validated on the same folds. None where no probe can be fitted
    (see `held_out_hits`)."""
    hits = held_out_hits(x, answers, clusters, seed=seed)
    others = [held_out_hits(x, control_task(answers, clusters, seed + k), clusters, seed=seed) for k in range(draws)]
    kept = [one for one in others if one is not None]
    return None if hits is None or not kept else Selectivity(hits, np.mean(kept, axis=0))
