"""Work in processes of this machine, one a device. They are started afresh (spawn), hold the models, and do a task at a time; this process
hands tasks out, hears them, and writes the run folder.

A worker ignores Ctrl-C and SIGTERM, which often reach all processes at once: what becomes of the work is decided here. It ends as soon as
this process does, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from patchscopes.core.errors import InputError, ResourceError
from patchscopes.runs.executor import DEATHS, Finished, Hear, Queue, Ready, Stop, Told
from patchscopes.runs.remote import Failure, MakeWorker, cores, make_worker, report_to
from patchscopes.runs.tasks import Job, Task

EACH = 4  # cores for a worker on a CPU, if nothing was said
POLL = 0.2  # seconds between two looks at `stop`
GUARD = (
    "a worker could not start; it says why above. A script that starts workers is read by each of them again: what it does must stand "
    'under if __name__ == "__main__":'
)


class Processes:
    """A process a device.

    workers  how many; default: one a CUDA device, without any one for four cores
    devices  on which, in turn: "cuda:0", "cpu", …; default: the CUDA devices, without any the CPU
    threads  of each; default: the cores divided among the workers
    """

    name = "local"
    make: MakeWorker = staticmethod(make_worker)  # how a worker is made, in its own process; a function of a module

    def __init__(self, workers: int | None = None, devices: Sequence[str] | None = None, threads: int | None = None):
        for what, number in (("workers", workers), ("threads", threads)):
            if number is not None and number < 1:
                raise InputError(f"{what}: found {number}; expected 1 or more")
        if devices is not None and not devices:
            raise InputError("devices: found none; expected one or more, or nothing at all for those of this machine")
        found = list(devices) if devices is not None else _cuda_devices()
        count = workers or (len(found) if found else max(1, cores() // EACH))
        self.asked = devices[0].partition(":")[0] if devices else None
        self.devices = [(found or ["cpu"])[k % len(found or ["cpu"])] for k in range(count)]
        self.threads = threads or max(1, cores() // count)

    @property
    def device(self) -> str:
        """The kind of device."""
        return self.devices[0].partition(":")[0]

    @property
    def workers(self) -> int:
        """How many at most."""
        return len(self.devices)

    def run(self, job: Job, tasks: Sequence[Task], hear: Hear, stop: Stop) -> None:
        """See `Executor`. What a worker raises while it is made is raised here; also what a task raises that is no matter of its cells.
        ResourceError if all workers die before they are ready."""
        queue = Queue(tasks)
        crew: list[_Member] = []
        try:
            for k, device in enumerate(self.devices[: len(tasks)]):
                crew.append(_Member(f"{device} {k + 1}", device, self.make, job, self.threads))
            while not stop.now and ((queue.waiting and not stop.asked) or any(member.task for member in crew)):
                for member in crew:
                    if queue.waiting and not stop.asked:
                        member.serve(queue)
                heard = [waitable for member in crew for waitable in member.waitables]
                if not heard:
                    raise ResourceError(
                        f"every worker died before it was ready, the last of {crew[-1].reason}. Fewer need less memory"
                    )
                ready = wait(heard, POLL)
                for member in crew:
                    if any(waitable in ready for waitable in member.waitables):
                        member.listen(queue, hear)
        finally:
            for member in crew:
                member.end()


class _Member:
    """A place for a worker: its process, which is started again when it dies, and its task."""

    def __init__(self, name: str, device: str, make: MakeWorker, job: Job, threads: int):
        self.name, self.device, self.reason = name, device, ""
        self.task: Task | None = None
        self._start = (make, name, job, device, threads)
        self._process: Any = None
        self._ready = False
        self._unready_deaths = 0
        self._begin()

    @property
    def waitables(self) -> list[Any]:
        """What shows that there is something to hear; nothing if there is no process."""
        return [] if self._process is None else [self._pipe, self._process.sentinel]

    def serve(self, queue: Queue) -> None:
        """Give the worker a task if it waits for one; start it again if it died."""
        if self._process is None and self._unready_deaths < DEATHS:
            self._begin()
        elif self._process is not None and self._ready and self.task is None:
            self.task = queue.waiting.popleft()
            try:
                self._pipe.send(self.task)
            except OSError:  # it has just died, which `listen` finds out
                return

    def listen(self, queue: Queue, hear: Hear) -> None:
        """Hear everything the worker has said, and whether it lives."""
        alive = self._process.is_alive()  # before its last words are read
        while (message := self._receive()) is not None:
            match message:
                case Ready():
                    self._ready, self._unready_deaths = True, 0
                case Finished():
                    self.task = None
                case Failure():
                    if not self._ready or not message.loses_worker:
                        raise message.as_error()
                    self.reason = message.told
                    return self._lose(queue, hear)
            hear(message)
        if not alive:
            self.reason = _cause(self._process.exitcode)
            if not self._ready and self._process.exitcode == 1:
                raise RuntimeError(GUARD)
            self._lose(queue, hear)

    def end(self) -> None:
        """Kill the process: it holds nothing that is not told."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._ready, self.task = False, None
        process = context.Process(target=_serve, args=(theirs, *self._start), name=self.name, daemon=True)
        with _environment({"OMP_NUM_THREADS": str(self._start[-1]), "OMP_WAIT_POLICY": "PASSIVE"}):
            process.start()
        self._process = process
        theirs.close()

    def _receive(self) -> Any:
        """What was said, None if nothing (more)."""
        try:
            return self._pipe.recv() if self._pipe.poll() else None
        except (EOFError, OSError, pickle.UnpicklingError):  # it died in the middle of a word
            self._process.join(timeout=1)
            return None

    def _lose(self, queue: Queue, hear: Hear) -> None:
        ready, task = self._ready, self.task
        self.end()
        if not ready:
            self._unready_deaths += 1
        self.task = None
        queue.lost(self.name, self.reason, task, hear)
        if self._unready_deaths == DEATHS:
            hear(Told(self.name, f"the worker {self.name} died {DEATHS} times before it was ready; the others go on", "note"))


def _cuda_devices() -> list[str]:
    import torch

    return [f"cuda:{k}" for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Inside, environment variables for a process to start with: those of OpenMP count before torch is loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cause(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"{name}, as the system sends it when memory is short" if name == "SIGKILL" else name


# -------------------------------------------------------------------------------------------------------- in the worker


def _serve(pipe: Connection, make: MakeWorker, name: str, job: Job, device: str, threads: int) -> None:
    """What the process of a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = make(job, device, threads)
        pipe.send(Ready(name, worker.about))
        while True:
            task = pipe.recv()
            done = worker.do(task, report_to(pipe.send, name, task), lambda message: pipe.send(Told(name, message)))
            pipe.send(Finished(name, done))
    except (EOFError, ConnectionError):  # nobody listens
        return
    except Exception as e:  # whatever it is, it belongs to the process that started this one
        pipe.send(Failure.of(e))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
