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
    """hits[item, layer]; left_out: relations without a probe, and why they count as misses."""

    items: tuple[Item, ...]
    layers: tuple[int, ...]
    hits: np.ndarray
    left_out: tuple[str, ...]


def probe(run: Run, items: Sequence[Item], *, seed: int = 0) -> Probed:
    """Cross-validated hits on the vectors that `run` kept, in one part, of prompts labelled with `at`."""
    vectors = {(prompt, layer): vector for (_, prompt, layer), vector in vectors_of(run).items()}
    number = {(text, at): k for k, text, at in run.prompts.select("prompt", "prompt_text", "at").iter_rows()}
    layers = tuple(sorted({layer for _, layer in vectors}))
    items = [item for item in items if (item.prompt, item.at) in number]
    hits = np.zeros((len(items), len(layers)), bool)
    left_out = []
    for relation in dict.fromkeys(item.relation for item in items):
        mine = [k for k, item in enumerate(items) if item.relation == relation]
        rows = [[vectors[number[items[k].prompt, items[k].at], layer] for k in mine] for layer in layers]
        x = torch.stack([torch.stack(row) for row in rows]).float()
        found = held_out_hits(x, [items[k].answers[0] for k in mine], [items[k].cluster for k in mine], seed=seed)
        if found is None:
            left_out.append(relation)
        else:
            hits[mine] = found
    return Probed(tuple(items), layers, hits, tuple(left_out))
