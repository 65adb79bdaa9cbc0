"""Work in this process: nothing to start, nothing to send; what notebooks and small sweeps use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchscopes.runs.executor import Finished, Hear, Ready, Stop, Told, Working, check_stop
from patchscopes.runs.tasks import EVERY, Job, Report, Stopped, Task

if TYPE_CHECKING:
    from patchscopes.runs.work import Worker

NAME = "here"


class Here:
    """One worker, this process. worker: one that is ready, with models that were given as objects, say; else it is made of the job."""

    name = NAME
    workers = 1

    def __init__(self, device: str | None = None, worker: Worker | None = None):
        self.asked, self.worker = device, worker

    @property
    def device(self) -> str:
        """The kind of device."""
        if self.asked is not None:
            return self.asked
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    def run(self, job: Job, tasks: Sequence[Task], hear: Hear, stop: Stop) -> None:
        """See `Executor`."""
        if self.worker is None:
            from patchscopes.runs.work import Worker

            self.worker = Worker.of(job, self.asked)
        hear(Ready(NAME, self.worker.about))
        for task in tasks:
            if stop.asked:
                return
            try:
                done = self.worker.do(task, _reporting(task, hear, stop), lambda message: hear(Told(NAME, message)))
            except Stopped:
                return
            hear(Finished(NAME, done))


def _reporting(task: Task, hear: Hear, stop: Stop) -> Report:
    last = time.monotonic()

    def report(share: float, what: str) -> None:
        nonlocal last
        check_stop(stop)
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            hear(Working(NAME, task.shard, share, what))

    return report
