"""What workers in other processes share, on this machine or another: how they report, and how their errors travel."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchscopes.core.errors import PatchscopesError, ResourceError
from patchscopes.runs.executor import Working
from patchscopes.runs.tasks import EVERY, Job, Report, Task

if TYPE_CHECKING:
    from patchscopes.runs.work import Worker

MakeWorker = Callable[[Job, str | None, int | None], "Worker"]


@dataclass(frozen=True)
class Failure:
    """An error of a worker, in a form that any process can read."""

    error: bytes | None  # pickled, if it can be
    told: str
    trace: str
    known: bool  # one of ours: a message for users

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What travels of an error."""
        told = str(error) if isinstance(error, PatchscopesError) else f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        return cls(_pickled(error), told, trace, isinstance(error, PatchscopesError))

    @property
    def loses_worker(self) -> bool:
        """Whether another worker may succeed, because it was the device that failed."""
        return self.known and isinstance(self.as_error(), ResourceError)

    def as_error(self) -> Exception:
        """The same error, of the same type if it is known here; its cause tells where in the worker it arose."""
        error = pickle.loads(self.error) if self.error is not None else RuntimeError(self.told)
        error.__cause__ = WorkerTraceback(self.trace)
        return error


class WorkerTraceback(Exception):
    """The traceback of an error, from the process in which it arose."""

    def __str__(self) -> str:
        return f"in a worker:\n{self.args[0]}"


def _pickled(error: Exception) -> bytes | None:
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:  # errors whose constructors want more than their message; which, nobody can say
        return None
    return content


def make_worker(job: Job, device: str | None, threads: int | None) -> Worker:
    """A worker as the job wants it, in a process of its own, which says nothing. threads: of torch, which is loaded here, not before."""
    import torch
    import transformers

    from patchscopes.runs.work import Worker

    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return Worker.of(job, device)


def report_to(hear: Callable[[Working], Any], worker: str, task: Task, check: Callable[[], None] = lambda: None) -> Report:
    """Tells of progress now and then. What `check` raises ends the task."""
    last = time.monotonic()

    def report(share: float, what: str) -> None:
        nonlocal last
        check()
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            hear(Working(worker, task.shard, share, what))

    return report


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
