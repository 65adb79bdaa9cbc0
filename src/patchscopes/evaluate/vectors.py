"""The source vectors that a run kept (outputs = { vectors = true })."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from patchscopes.runs import Run


def vectors_of(run: Run) -> dict[tuple[str, int, int], Tensor]:
    """(part, prompt, source layer) → [d_model], for runs that read one position of each prompt."""
    from safetensors import safe_open

    found: dict[tuple[str, int, int], Tensor] = {}
    for path in sorted((run.path / "tensors").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])["vectors"]
            for state, vector in zip(about["states"], file.get_tensor("vectors"), strict=True):
                found[state["part"], state["prompt"], state["source_layer"]] = vector
    return found
