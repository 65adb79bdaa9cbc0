"""How far two ways to one result may be apart by rounding alone, as a share of its largest entry."""

from __future__ import annotations

import torch

SHARES = {torch.bfloat16: 6e-2, torch.float16: 2e-2}
EXACT = 1e-4  # float32 and float64


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """For what `device` computes in `dtype`. Where a GPU may multiply float32 in TF32 its factors have the ten bits of float16."""
    coarse = torch.backends.cuda.matmul.fp32_precision in ("tf32", "bf16")  # of set_float32_matmul_precision("high") and "medium"
    if dtype == torch.float32 and device.type == "cuda" and coarse:
        dtype = torch.float16
    return SHARES.get(dtype, EXACT)
