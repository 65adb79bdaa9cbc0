"""A worker in an actor of a Ray cluster (see `on_ray`). Nothing of Ray is needed here."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchscopes.experiment.resolve import INPUTS
from patchscopes.runs.executor import Finished, Ready, Told, Working
from patchscopes.runs.remote import Failure, MakeWorker, report_to
from patchscopes.runs.tasks import Job, Stopped, Task

if TYPE_CHECKING:
    from patchscopes.runs.work import Worker


class Actor:
    """A worker in its actor. It has two lanes: one works, the other is asked how far it is, and told to stop."""

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        sent: tuple[dict[str, Any], dict[str, bytes]],
        make: MakeWorker,
        device: str,
        threads: int,
    ):
        os.environ.update(environment, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS=str(threads))  # before torch is loaded
        self.name, self._how = name, (sent, make, device, threads)
        self._worker: Worker | None = None
        self._messages: deque[Working | Told] = deque()
        self._cancelled = False

    def begin(self) -> Ready | Failure:
        """Load the models."""
        (document, inputs), make, device, threads = self._how
        try:
            with tempfile.TemporaryDirectory(prefix="patchscopes-") as folder:
                Path(folder, INPUTS).mkdir()
                for name, content in inputs.items():
                    Path(folder, INPUTS, name).write_bytes(content)
                self._worker = make(Job(document, folder), device, threads)
            return Ready(self.name, self._worker.about)
        except Exception as e:  # whatever it is, it belongs to the process that started this one
            return Failure.of(e)

    def do(self, task: Task) -> Finished | Failure | None:
        """Do a task; None if it was cancelled."""
        assert self._worker is not None
        try:
            tell = lambda message: self._messages.append(Told(self.name, message))
            return Finished(
                self.name, self._worker.do(task, report_to(self._messages.append, self.name, task, self._check), tell)
            )
        except Stopped:
            return None
        except Exception as e:  # as above
            return Failure.of(e)

    def heard(self) -> list[Working | Told]:
        """What was said since the last time."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def cancel(self) -> None:
        """Stop between two batches."""
        self._cancelled = True

    def _check(self) -> None:
        if self._cancelled:
            raise Stopped
