"""Executors by name."""

from __future__ import annotations

from patchscopes.core.errors import UnknownName, nearest
from patchscopes.runs.executor import Executor
from patchscopes.runs.here import Here

NAMES = ("here", "local", "ray")


def executor_from(
    name: str, *, workers: int | None = None, device: str | None = None, gpus: float | None = None, address: str | None = None
) -> Executor:
    """here: this process; local: processes of this machine; ray: actors of a Ray cluster."""
    if name not in NAMES:
        raise UnknownName(f"unknown executor {name!r}. {nearest(name, NAMES)}")
    return Here(device)
