"""The report: figures with their goals, the machine, and everything behind them as one JSON document."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from patchscopes.core.plain import plain

FORMAT = 1  # of the JSON document
PACKAGES = ("patchscopes", "torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Figure:
    """One ratio. `at_most`, `at_least`: its goal; none if it is only reported. value None: it could not be had, the note says why."""

    part: str
    name: str
    value: float | None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def goal(self) -> str:
        """In words."""
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return f"≥ {self.at_least:g}" if self.at_least is not None else ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal or a value."""
        if self.value is None or not self.goal:
            return None
        return self.value <= self.at_most if self.at_most is not None else self.value >= (self.at_least or 0)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "reached": self.reached}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def in_words(m: dict[str, Any]) -> str:
    """The machine in a line."""
    memory = f", {m['memory_bytes'] / 2**30:.0f} GiB" if m["memory_bytes"] else ""
    gpu = f", {m['gpu']}" if m["gpu"] else ""
    busy = f", load {m['load']:.1f} at the start" if m["load"] is not None else ""
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['vector_instructions']}{memory}{gpu}{busy}; "
        f"Python {m['python']}, torch {m['versions']['torch']}, transformers {m['versions']['transformers']}"
    )


def document(
    *,
    model: dict[str, Any],
    settings: dict[str, Any],
    machine: dict[str, Any],
    peers: dict[str, Any],
    figures: list[Figure],
    scores: dict[str, Any],
    floors: dict[str, Any],
) -> dict[str, Any]:
    """Everything as one document. What is no number (NaN, infinity) is null."""
    found = {
        "format": FORMAT,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model,
        "settings": settings,
        "machine": machine,
        "peers": peers,
        "figures": [figure.to_json() for figure in figures],
        "contestants": scores,
        "floor": floors,
    }
    return plain(found)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None
