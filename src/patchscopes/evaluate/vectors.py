"""The source vectors that a run kept (outputs = { vectors = true })."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from patchscopes.runs import Run


def vectors_of(run: Run) -> dict[tuple[str, int, int], Tensor]:
    """(part, prompt, source layer) → [d_model], for runs that read one position of each prompt."""
    return {(state["part"], state["prompt"], state["source_layer"]): vector for state, vector in _states(run)}


def vectors_at(run: Run) -> dict[tuple[int, int, int], Tensor]:
    """(prompt, position, source layer) → [d_model], for runs of one part."""
    return {(state["prompt"], state["position"], state["source_layer"]): vector for state, vector in _states(run)}


def _states(run: Run) -> Iterator[tuple[dict[str, Any], Tensor]]:
    from safetensors import safe_open

    for path in sorted((run.path / "tensors").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])["vectors"]
            yield from zip(about["states"], file.get_tensor("vectors"), strict=True)
