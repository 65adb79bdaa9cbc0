"""Numbers that are numbers: NaN and infinity spread through a run silently, so they are refused before it."""

from __future__ import annotations

import torch
from torch import Tensor

from patchscopes.core.errors import VectorError


def require_finite(value: Tensor, what: str) -> None:
    """VectorError, which begins with `what`, if an entry is NaN or infinite."""
    if value.is_meta or torch.isfinite(value).all():
        return
    bad = int((~torch.isfinite(value)).sum())
    raise VectorError(f"{what} has {bad} of {value.numel()} entries that are not finite (NaN or infinity); expected numbers")
