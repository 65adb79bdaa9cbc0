"""Executors by name."""

from __future__ import annotations

from patchscopes.core.errors import InputError, UnknownName, nearest
from patchscopes.runs.executor import Executor

NAMES = ("here", "local", "ray")
TAKES = {  # beside what all have
    "here": {"device"},
    "local": {"device", "workers", "threads"},
    "ray": {"workers", "gpus", "cpus", "threads", "address"},
}


def executor_from(
    name: str,
    *,
    workers: int | None = None,
    device: str | None = None,
    gpus: float | None = None,
    cpus: float | None = None,
    threads: int | None = None,
    address: str | None = None,
) -> Executor:
    """here: this process; local: processes of this machine (see `Processes`); ray: actors of a Ray cluster (see `OnRay`). None: as these
    have it. UnknownName; InputError for what an executor does not take."""
    if name not in NAMES:
        raise UnknownName(f"unknown executor {name!r}. {nearest(name, NAMES)}")
    given = {"workers": workers, "device": device, "gpus": gpus, "cpus": cpus, "threads": threads, "address": address}
    if wrong := [key for key, value in given.items() if value is not None and key not in TAKES[name]]:
        fits = [other for other in NAMES if wrong[0] in TAKES[other]]
        raise InputError(f"the executor {name!r} takes no {wrong[0]}; found {given[wrong[0]]!r}. {' and '.join(fits)} take it")
    if name == "here":
        from patchscopes.runs.here import Here

        return Here(device)
    if name == "local":
        from patchscopes.runs.processes import Processes

        return Processes(workers, [one.strip() for one in device.split(",")] if device else None, threads)
    from patchscopes.runs.on_ray import OnRay

    return OnRay(address, workers, gpus, 1 if cpus is None else cpus, threads)
