"""Safetensors files with a header in JSON, as maps and inverters are kept in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from patchscopes.core.errors import InputError


def read_tensor_file(path: Path, header: str, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What stands under `header`, {} if nothing does, and all tensors. InputError if it cannot be read as `kind`."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(header, "{}"))
            # copies, because where a tensor lies in memory can change the last bits of what is computed with it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, json.JSONDecodeError) as e:
        raise InputError(f"{str(path)!r} could not be read as {kind}: {e}") from None
    if not isinstance(about, dict):
        raise InputError(f"{str(path)!r} could not be read as {kind}: its header is {about!r}; expected a JSON object")
    return about, tensors
