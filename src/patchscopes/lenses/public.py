"""Files of other projects that torch saved: tensors and plain values are read, nothing else; whatever is in them, no code runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from patchscopes.core.errors import InputError


def read_tensors(path: Path, what: str) -> dict[str, Any]:
    """The dict in a .pt file. InputError if it is none."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a torn file makes the unpickler fail in any way
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"{str(path)!r} could not be read as {what}: {reason}") from None
    if not isinstance(found, dict):
        raise InputError(
            f"{str(path)!r} could not be read as {what}: it holds a {type(found).__name__}; expected a dict of tensors"
        )
    return found
