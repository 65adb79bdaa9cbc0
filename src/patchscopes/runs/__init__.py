"""Runs that survive: plans, work that can be stopped and resumed, and the folder that records it.

Names are imported when first used: reading a run needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchscopes.runs.executor import Executor, Stop
    from patchscopes.runs.folder import Run, open_run
    from patchscopes.runs.here import Here
    from patchscopes.runs.recording import resume, sweep

_HOMES = {
    "Executor": "executor",
    "Here": "here",
    "Run": "folder",
    "Stop": "executor",
    "open_run": "folder",
    "resume": "recording",
    "sweep": "recording",
}

__all__ = ["Executor", "Here", "Run", "Stop", "open_run", "resume", "sweep"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"patchscopes.runs.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'patchscopes.runs' has no attribute {name!r}; it has {', '.join(__all__)}")
