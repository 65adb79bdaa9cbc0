"""Workers that load nothing, and do what executors must live with. Functions of a module, which other processes can import."""

import os
import signal
import time
from pathlib import Path

from patchscopes.core.errors import NotAvailableError, ResourceError
from patchscopes.runs.tasks import Done


class Fake:
    """Does nothing, in a while; says which process did it."""

    about = {"conditions": {}, "models": {}, "machine": {}}  # noqa: RUF012

    def __init__(self, folder, seconds=0.05):
        self.folder, self.seconds = Path(folder), seconds

    def do(self, task, report, tell):
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            report(0.5, "reading")
            time.sleep(0.01)
        return Done(task, str(os.getpid()).encode(), None, (), (), self.seconds)


class Deadly(Fake):
    def do(self, task, report, tell):
        if task.shard == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().do(task, report, tell)


class Wrong(Fake):
    def do(self, task, report, tell):
        raise ValueError("that is wrong")


class LosesItsDevice(Fake):
    def do(self, task, report, tell):
        mark = self.folder / f"lost {task.shard}"
        if not mark.exists():
            mark.touch()
            raise ResourceError("the device is lost: a CUDA error")
        return super().do(task, report, tell)


def steady(job, device, threads):
    return Fake(job.folder)


def slow(job, device, threads):
    return Fake(job.folder, 60)


def deadly(job, device, threads):
    return Deadly(job.folder)


def wrong(job, device, threads):
    return Wrong(job.folder)


def loses_its_device(job, device, threads):
    return LosesItsDevice(job.folder)


def unable(job, device, threads):
    raise NotAvailableError("there is no such model")


def broken(job, device, threads):
    raise KeyError("broken")


def dying(job, device, threads):
    os.kill(os.getpid(), signal.SIGKILL)


def first_dies(job, device, threads):
    """Dies while it is made, if it is the first that is made in this folder; lives otherwise."""
    mark = Path(job.folder) / f"died {device}"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Fake(job.folder)
