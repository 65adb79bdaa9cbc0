"""What goes between those who plan and those who work: plain data, nothing loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscopes.experiment.documents import absolute, each_path
from patchscopes.experiment.spec import Experiment

Report = Callable[[float, str], None]  # (share of the task, what)
Tell = Callable[[str], None]
EVERY = 0.2  # seconds between two reports


class Stopped(Exception):
    """The work was told to stop in the middle of a shard; nothing of the shard is kept."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know: the experiment, resolved; its folder, against which paths of inputs are seen; what to keep."""

    document: dict[str, Any]
    folder: str

    @property
    def experiment(self) -> Experiment:
        """The experiment, its inputs in the folder."""
        document = each_path(self.document, lambda path, _: absolute(path, Path(self.folder)))
        return Experiment.said(document, str(Path(self.folder) / "run.json"))


@dataclass(frozen=True)
class Task:
    """Readings to be made: those numbered `cells` of a look, which belong to a shard."""

    shard: int
    look: int
    cells: tuple[int, ...]
    attempt: int = 0
    provenance: int = 0


@dataclass(frozen=True)
class Done:
    """What came of a task: rows as a Parquet file, tensors as a safetensors file."""

    task: Task
    rows: bytes
    tensors: bytes | None
    ids: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    seconds: float
