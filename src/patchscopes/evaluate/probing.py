"""The probe baseline of attribute extraction: for every relation and source layer a linear probe of the object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from patchscopes.evaluate.data import Item
from patchscopes.evaluate.probe import held_out_hits
from patchscopes.evaluate.vectors import vectors_of

if TYPE_CHECKING:
    from patchscopes.runs import Run


@dataclass(frozen=True)
class Probed:
    """hits[item, layer]; NaN where a relation has no probe. left_out: relations without one, and why."""

    layers: tuple[int, ...]
    hits: np.ndarray
    left_out: tuple[str, ...]


def probe(run: Run, items: Sequence[Item], *, seed: int = 0) -> Probed:
    """Cross-validated hits on the vectors that `run` kept, in one part, of prompts labelled with `at`."""
    vectors = vectors_of(run)
    number = {(text, at): k for k, text, at in run.prompts.select("prompt", "prompt_text", "at").iter_rows()}
    layers = tuple(sorted({layer for *_, layer in vectors}))
    hits = np.full((len(items), len(layers)), np.nan)
    left_out = []
    for relation in dict.fromkeys(item.relation for item in items):
        mine = [k for k, item in enumerate(items) if item.relation == relation and (item.prompt, item.at) in number]
        answers, clusters = [items[k].answers[0] for k in mine], [items[k].cluster for k in mine]
        for column, layer in enumerate(layers):
            rows = [vectors[run_part(vectors), number[items[k].prompt, items[k].at], layer] for k in mine]
            found = held_out_hits(torch.stack(rows).float(), answers, clusters, seed=seed) if rows else None
            if found is None:
                left_out.append(relation)
                break
            hits[mine, column] = found
    return Probed(layers, hits, tuple(left_out))


def run_part(vectors: dict[tuple[str, int, int], torch.Tensor]) -> str:
    """The name of the one part that the vectors are of."""
    (part,) = {part for part, *_ in vectors}
    return part
